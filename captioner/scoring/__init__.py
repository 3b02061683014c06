"""Predictions -> scores -> report. No torch. What each score is: docs/scores.md.

read_predictions(path, references) -> predictions, Counter of those left out
find_origin(adapter, predictions, names) -> the training run behind predictions
read_facts(predictions, labels, origin, flags) -> predictions, facts, Counter of those left out
score_predictions(predictions, signature, facts, training, of_bdd100k) -> scores.json's content
compare_files(paths, other_paths, references) -> comparison.json's content
write_report(path, title, rows, images, scores) -> size in bytes
"""
