"""Pickles that show whether they were opened."""

from pathlib import Path


class Planted:
    """A pickle that writes a file when it is opened."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)
