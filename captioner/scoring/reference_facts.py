"""The facts of label files that captions are held against, read as for the captions that the model was trained on.

predictions, facts, left_out = read_facts(predictions, paths, origin, {"lanes": False})
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec

from captioner.bdd100k.facts import Facts
from captioner.bdd100k.frames import LabelOptions
from captioner.bdd100k.label_files import read_labels
from captioner.bdd100k.label_report import LabelReport
from captioner.runtime.errors import UserError
from captioner.scoring.grammar import read_wording
from captioner.scoring.origin import Origin
from captioner.scoring.predictions import Prediction

LISTED = 3  # names that a message gives as examples


def choose_options(origin: Origin | None, flags: Mapping[str, object]) -> tuple[LabelOptions, str]:
    """How labels are to be read, and a line that says it: as flags say, those that are not None, else as the run did.

    Raises UserError for a record whose settings are none.
    """
    names = [field.name for field in dataclasses.fields(LabelOptions)]
    recorded = {name: origin.config[name] for name in names if name in origin.config} if origin else {}
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        options = msgspec.convert(recorded | given, LabelOptions)
    except msgspec.ValidationError as error:
        raise UserError(f"{origin.record}: not a record of how labels were read ({error})") from None
    told = ", ".join(f"{name.replace('_', ' ')} {getattr(options, name)}" for name in names)
    source = f"as {origin.record} says" if recorded else "by default: no record of a run lies beside them"
    return options, f"labels are read {source}{', but for flags' if given else ''}: {told}"


def read_facts(
    predictions: Sequence[Prediction],
    labels: Sequence[Path] = (),
    origin: Origin | None = None,
    flags: Mapping[str, object] = MappingProxyType({}),
) -> tuple[list[Prediction], list[Facts] | None, Counter[str]]:
    """The predictions that are scored, the facts of each, if there are any, and how many are left out by reason.

    Facts are read in the first reference of each prediction, where find_facts finds any, or from the label files
    `labels` if there are any, with the options that choose_options finds; prints which, and what was read. Raises
    UserError when none of the predictions has a label.
    """
    if not labels:
        references = [prediction.references[0] for prediction in predictions]
        facts, worded = read_wording(references)
        if 0 < worded < len(references):
            scored, are = "facts are scored" if facts else "too few for scores of facts", "is" if worded == 1 else "are"
            print(f"{worded:,} of {len(references):,} references {are} in this project's wording: {scored}")
        return list(predictions), facts, Counter()
    (options, told), report = choose_options(origin, flags), LabelReport()
    labelled = {frame.name: frame.facts for frame in read_labels(labels, report, options)}
    print(f"{told}\n{report}")
    scored = [prediction for prediction in predictions if prediction.name in labelled]
    if not scored:
        names = ", ".join(row.name for row in predictions[:LISTED]) + ", ..." * (len(predictions) > LISTED)
        raise UserError(f"--labels {labels[0]}: none of the captioned images is in it ({names})")
    left_out = Counter({"predictions without labels": len(predictions) - len(scored)})
    return scored, [labelled[prediction.name] for prediction in scored], +left_out
