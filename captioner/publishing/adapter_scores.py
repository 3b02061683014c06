"""The scores that an adapter keeps beside it and shows in its model card."""

from pathlib import Path

from captioner.publishing.model_card import write_model_card
from captioner.publishing.records import read_scores
from captioner.runtime.errors import UserError
from captioner.runtime.files import write_json


def keep_scores(adapter: Path, scores: dict) -> None:
    """Write scores.json beside the adapter and into its model card, unless scores of more images are there.

    Prints what was done. A folder that can't be written, such as a shared one, is left as it is.
    """
    try:
        before = read_scores(adapter)
        if before is not None and before["n"] > scores["n"]:
            print(f"{adapter / 'README.md'} keeps its scores, of {before['n']:,} images")
            return
        write_json(adapter / "scores.json", scores)
        write_model_card(adapter)
        print(f"{adapter / 'README.md'}, the model card, has these scores now")
    except UserError as error:
        print(f"note: not kept beside the adapter: {error}")
