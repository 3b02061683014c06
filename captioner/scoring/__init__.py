"""Predictions -> scores -> report. No torch.

read_predictions(path, references) -> predictions, Counter of those left out
write_predictions(path, predictions)
score_predictions(predictions, signature, facts) -> scores.json's content
compare_predictions(one, other) -> comparison
write_report(path, title, rows, images, scores) -> bytes
"""
