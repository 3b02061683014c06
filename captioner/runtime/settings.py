"""Settings as small frozen dataclasses, a group each for what belongs together, and their flat names.

A field's name is its flag and its name in run.json, whatever group it is in; its comment is its --help:

    config = make_config(TrainConfig, lora_rank=8, seed=1)    # config.lora.lora_rank
    config = read_flags(config, ["--lora-rank", "4"])
    flatten(config)["lora_rank"]
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from captioner.runtime.cli import find_home, report_error
from captioner.runtime.errors import UserError
from captioner.runtime.processes import check_launcher

Config = TypeVar("Config")


def setting(default, **known: bool) -> Any:
    """A field with its default and marks, such as free=True, by which name_fields() finds it."""
    return dataclasses.field(default=default, metadata=known)


def read_flags(default: Config, args: Sequence[str]) -> Config:
    """`default` with the flags in `args`. A wrong flag prints what it may have meant and exits with 2."""
    import tyro

    try:
        check_launcher()
    except UserError as error:
        sys.exit(report_error(error))
    if os.environ.get("RANK", "0") != "0":  # under accelerate launch one process speaks, and all may fail
        os.environ["TQDM_DISABLE"] = "1"
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    find_home()
    try:
        refuse_empty_paths(type(default), args)
        args = spell_out(type(default), args)
        return tyro.cli(type(default), default=default, args=args, config=(tyro.conf.OmitArgPrefixes,))
    except UserError as error:
        sys.exit(report_error(error))


def refuse_empty_paths(config_class: type, args: Sequence[str]) -> None:
    """Raise UserError for an empty path, as of a shell's variable that is not set: it would be the current folder."""
    flag, paths = "", name_paths(config_class)
    for word in args:
        for part in word.split("=", 1) if word.startswith("--") else [word]:
            flag = part if part.startswith("--") else flag
            if not part and flag.removeprefix("--").replace("-", "_") in paths:
                raise UserError(f"{flag}: is given an empty path; name one, or leave the flag out")


def spell_out(config_class: type, args: Sequence[str]) -> list[str]:
    """`args` with --name and --no-name of a bool that may be None as tyro takes them: --name True and --name False."""
    names = {known.name for _, known in list_fields(config_class) if known.type == bool | None}
    spelt = []
    for word, following in zip(args, [*args[1:], ""], strict=False):
        name = word.removeprefix("--").replace("-", "_")
        is_given = following.title() in ("True", "False", "None")
        if word.startswith("--") and name.removeprefix("no_") in names and not is_given:
            spelt += [f"--{name.removeprefix('no_')}", str(not name.startswith("no_"))]
        else:
            spelt.append(word)
    return spelt


def make_config(config_class: type[Config], **settings) -> Config:
    """A configuration with these settings, by their flat names. Raises TypeError for an unknown name."""
    groups: dict[str, dict] = {}
    for name, value in settings.items():
        owners = [group for group, known in list_fields(config_class) if known.name == name]
        if not owners:
            raise TypeError(f"{config_class.__name__} has no setting {name}")
        groups.setdefault(owners[0], {})[name] = value
    own = groups.pop("", {})
    types = {known.name: known.type for known in dataclasses.fields(config_class)}
    return config_class(**own, **{group: types[group](**values) for group, values in groups.items()})


def list_fields(config_class: type) -> Iterator[tuple[str, dataclasses.Field]]:
    """(group, field) of each setting; the group "" is the configuration itself."""
    for known in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(known.type):
            yield from ((known.name, inner) for inner in dataclasses.fields(known.type))
        else:
            yield "", known


def name_fields(config_class: type, known: str) -> set[str]:
    """The names of the settings that are marked so, as in setting(default, free=True)."""
    return {field.name for _, field in list_fields(config_class) if field.metadata.get(known)}


def name_paths(config_class: type) -> set[str]:
    """The names of the settings that hold a path or may hold one."""
    return {field.name for _, field in list_fields(config_class) if "Path" in str(field.type)}


def flatten(config) -> dict:
    """{name: value} of all settings, as JSON types."""
    return {
        field.name: _plain(getattr(getattr(config, group) if group else config, field.name))
        for group, field in list_fields(type(config))
    }


def _plain(value):
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def check(group, must_be: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Raise UserError unless holds(value) for each of the settings `names` that is not None."""
    for name in names:
        value = getattr(group, name)
        if value is not None and not holds(value):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {must_be}")
