"""The scores that an adapter keeps beside it and shows in its model card."""

from pathlib import Path

from captioner.data.run_record import hash_adapter
from captioner.publishing.model_card import write_model_card
from captioner.publishing.records import read_scores
from captioner.runtime.errors import UserError
from captioner.runtime.files import lock_folder, write_json
from captioner.scoring.scores import count_things


def keep_scores(adapter: Path, scores: dict, scored: str | None) -> None:
    """Write scores.json beside the adapter and into its model card, unless scores of more images are there.

    `scored` is what hash_adapter gave when captioning began: another adapter, which main.py has written there since,
    does not get the scores. Prints what was done. A folder that can't be written, such as a shared one, is left as it
    is, and so is one that main.py is writing to.
    """
    try:
        with lock_folder(adapter, "--adapter"):
            if hash_adapter(adapter) != scored:
                raise UserError(f"{adapter}: another adapter is there than was captioned with; run eval.py again")
            before = read_scores(adapter)
            if before is not None and before["n"] > scores["n"]:
                print(f"{adapter / 'README.md'} keeps its scores, of {count_things(before['n'], 'image')}")
                return
            write_json(adapter / "scores.json", scores)
            write_model_card(adapter)
            print(f"{adapter / 'README.md'}, the model card, has these scores now")
    except UserError as error:
        print(f"note: not kept beside the adapter: {error}")
