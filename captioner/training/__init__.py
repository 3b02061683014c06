"""The Trainer, and what lets a run survive.

CaptionTrainer(model, arguments, datasets, ...)              # the guarded loss, checkpoints within epochs
find_micro_batch(model, dataset, ...) -> frames              # that fit in one pass
find_checkpoint(folder) -> path                              # the newest that is intact
find_unfinished(output, state, resume, overwrite) -> state   # what the folder's run was; refuses another
RunLog(run_dir, ...)                                         # metrics.jsonl, dashboard.png, wandb
ValidationCaptions(log, examples, ...)                       # captions after each epoch, scored
"""
