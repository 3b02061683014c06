"""What is trained and tested on: images with their captions, one by one or as a table of Hugging Face's `datasets`.

Images stay paths in it: they are opened by open_image alone.

table = tabulate_examples(splits["train"])      # columns name, image, caption, group, index
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # it takes a while to import
    from datasets import Dataset


class Example(NamedTuple):
    """An image and its captions."""

    name: str  # as captions name it: its file, or its path below the folder of images
    image: Path
    caption: str  # the first
    group: str = ""  # what must not be in two splits: a ride
    more: tuple[str, ...] = ()  # captions

    @property
    def captions(self) -> tuple[str, ...]:
        return (self.caption, *self.more)


def tabulate_examples(examples: Sequence[Example]) -> "Dataset":
    """A table with a row for each image: its name, path, captions, group and place."""
    from datasets import Dataset, Features, List, Value

    columns = {
        "name": [example.name for example in examples],
        "image": [str(example.image) for example in examples],
        "caption": [example.captions for example in examples],
        "group": [example.group for example in examples],
        "index": range(len(examples)),
    }
    text = Value("string")
    types = {"name": text, "image": text, "caption": List(text), "group": text, "index": Value("int64")}
    return Dataset.from_dict(columns, Features(types))


def list_examples(table: "Dataset", count: int) -> list[Example]:
    """The examples of the first `count` rows."""
    rows = table.with_format(None).select(range(min(count, len(table))))
    return [
        Example(row["name"], Path(row["image"]), row["caption"][0], row["group"], tuple(row["caption"][1:]))
        for row in rows
    ]
