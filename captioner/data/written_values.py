"""Texts that stand for another value, as pandas writes a column of lists: "['A car.', 'Two cars.']", nan, None."""

import ast
import json

NO_TEXTS = ("nan", "none", "null", "<na>", "n/a")  # what programs write where a value is missing


def unpack_texts(text: str) -> list[str] | None:
    """The texts that `text` stands for: those of a list, however deep, none for a missing one, else the text itself.

    None for a value that is neither a text nor a list of texts.
    """
    value = parse_literal(text)
    if value is None or isinstance(value, str):  # a caption, in quotes maybe
        return [text]
    if text.strip().lower() in NO_TEXTS:
        return []
    texts = flatten(value)
    return texts if isinstance(value, list | tuple) and all(isinstance(item, str) for item in texts) else None


def flatten(value: object) -> list:
    """What is in a list and in the lists of it; any other value by itself."""
    items = [value]
    while any(isinstance(item, list | tuple) for item in items):
        items = [leaf for item in items for leaf in (item if isinstance(item, list | tuple) else [item])]
    return items


def is_list(value) -> bool:
    """Whether what parse_literal found is a list of captions."""
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def parse_literal(text: str):
    """What `text` stands for if it is a value that JSON or Python has written as text; None for a caption.

    What neither can have written, but is no caption either, such as a list of numpy's, is given as bytes.
    """
    text = text.strip()
    unknown = text.encode(errors="backslashreplace")
    if text.lower() in NO_TEXTS or text.startswith(("array(", "tensor(")):
        return unknown
    if not (text.startswith(("[", "{", "(", '"', "'", "b'", 'b"')) and text.endswith(("]", "}", ")", '"', "'"))):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        value = ast.literal_eval(text)
        return value if repr(value) == text else unknown  # Python joins the texts of ['a' 'b'], which is numpy's
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return unknown if text.startswith("[") and text.endswith("]") else None
