"""Whether captions are worded as this project words them, so that their facts can be scored. No torch.

facts = find_facts([row.references[0] for row in predictions])      # None: score them as text alone
"""

from collections.abc import Sequence

from captioner.bdd100k.facts import Facts
from captioner.bdd100k.parsing import read_caption

# Share of captions that must be of the grammar. All that are made from labels are, and hardly any that people write, so
# the share lies near 1 or near 0. With half of them the scores of facts are about most of the images, and captions that
# somebody edited or added to their own don't take the scores of facts away from the others.
LEAST = 0.5


def find_facts(captions: Sequence[str]) -> list[Facts] | None:
    """The facts of each caption; None where fewer than LEAST of the captions are of this project's grammar."""
    return read_wording(captions)[0]


def read_wording(captions: Sequence[str]) -> tuple[list[Facts] | None, int]:
    """What find_facts gives, and how many of the captions state a fact and nothing that can't be read."""
    readings = [read_caption(caption) for caption in captions]
    worded = sum(reading.facts != Facts() and not reading.unread for reading in readings)
    enough = worded >= max(LEAST * len(captions), 1)
    return [reading.facts for reading in readings] if enough else None, worded
