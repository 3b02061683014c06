"""The facts that predictions are held against: those of their references, or of labels."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from captioner.bdd100k.facts import Facts
from captioner.bdd100k.label_files import read_labels
from captioner.bdd100k.label_report import LabelReport
from captioner.bdd100k.parsing import parse_caption
from captioner.runtime.errors import UserError
from captioner.scoring.predictions import Prediction, name_examples


def read_facts(
    predictions: Sequence[Prediction], labels: Sequence[Path] = ()
) -> tuple[list[Prediction], list[Facts], Counter]:
    """The predictions that are scored, the facts of each, and how many are left out by reason.

    Facts are read in the first reference of each prediction, or from the label files `labels` if there are any.
    Raises UserError when none of the predictions has a label.
    """
    if not labels:
        return list(predictions), [parse_caption(prediction.references[0]) for prediction in predictions], Counter()
    labelled = {frame.name: frame.facts for frame in read_labels(labels, LabelReport())}
    scored = [prediction for prediction in predictions if prediction.name in labelled]
    if not scored:
        names = name_examples([prediction.name for prediction in predictions])
        raise UserError(f"--labels {labels[0]}: none of the captioned images is in it ({names})")
    left_out = Counter({"predictions without labels": len(predictions) - len(scored)})
    return scored, [labelled[prediction.name] for prediction in scored], +left_out
