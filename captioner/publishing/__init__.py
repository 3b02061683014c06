"""What is made of a finished adapter for others: model card, merged model, upload.

publish(config)                           # publish: all of it that is asked for, by main.py
keep_scores(folder, scores, sha256)       # adapter_scores: beside the adapter and in its card, by eval.py
write_model_card(folder)                  # model_card: README.md, from run.json and scores.json
merge_adapter(folder, output)             # merge: the model with the adapter merged in
push_to_hub(folder, repo) -> address      # hub: a private repository
push_captions(folder, repo) -> address    # hub: a private data set
"""
