"""What is made of a finished adapter for others: model card, merged model, upload.

write_model_card(folder)                  # README.md of an adapter's folder, from run.json and scores.json
merge_adapter(folder, output)             # the model with the adapter merged in
push_to_hub(folder, repo) -> address      # a private repository
"""
