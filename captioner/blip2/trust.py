"""What is refused of a model's or an adapter's folder that comes from somebody else. No torch.

    check_model_folder(Path("blip2-opt-2.7b"))      # names no code, has no link that leaves it
    check_adapter_folder(Path("blip2-finetuned"), LORA_TARGETS.values())

Weights are read from safetensors alone: a pickle, which runs code when it is opened, is never opened.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path

from captioner.bdd100k.file_kinds import name_pointer
from captioner.data.run_record import ADAPTER_WEIGHTS
from captioner.runtime.errors import UserError
from captioner.runtime.files import is_inside, read_json

HEAD = 64  # bytes in which a pointer in the place of a file shows
MAX_JSON = 64 * 2**20  # bytes of a JSON file beside a model; the largest, a tokenizer, has 4 MB
FREE_KEYS = (  # of adapter_config.json; each other key must have LoRA's default, which names no module to import
    *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules"),
)


def check_model_folder(folder: Path) -> None:
    """Raise UserError for a link that leaves the folder, a pointer to a file, and settings that name code to be run."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not is_inside(path, folder):
            raise UserError(f"{path}: a link to {path.resolve()}, outside of the folder; put the file itself there")
        if path.is_file():
            with open(path, "rb") as file:
                if pointer := name_pointer(file.read(HEAD)):
                    raise UserError(f"{path}: {pointer}")
        if path.suffix == ".json" and path.is_file():
            if path.stat().st_size > MAX_JSON:
                raise UserError(f"{path}: {path.stat().st_size:,} bytes, more than {MAX_JSON:,}; fetch it again")
            for key, value in walk(path):
                if key == "auto_map" and value:
                    raise UserError(
                        f"{path}: auto_map {json.dumps(value)[:200]} names code to be run, and code of a model's is "
                        "never run here; take a checkpoint without it"
                    )


def walk(path: Path) -> Iterator[tuple[str, object]]:
    """The keys and values of a JSON file's objects, at any depth but in tokenizer.json, which has no settings."""
    stack = [read_json(path, "fetch it again", object)] if path.name != "tokenizer.json" else []
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            yield from value.items()
            stack += value.values()
        elif isinstance(value, list):
            stack += value


def check_adapter_folder(folder: Path, targets: Collection[str], base: str) -> None:
    """Raise UserError unless the folder holds LoRA weights in safetensors, with no setting but those of main.py.

    `targets` are the target_modules that are known; an expression from outside might take for ever. `base` is the
    model that the adapter is to be put on.
    """
    from peft import LoraConfig

    check_model_folder(folder)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        raise UserError(
            f"{folder / 'adapter_model.bin'}: a pickle, which may run code, and is not opened; ask for "
            f"{ADAPTER_WEIGHTS}, or train again"
            if pickled
            else f"{folder / ADAPTER_WEIGHTS}: not there; train again with python main.py"
        )
    path = folder / "adapter_config.json"
    settings = read_json(path, "fetch it again", object)
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise UserError(f"{path}: must be a LoRA adapter's; train one with python main.py")
    defaults = LoraConfig().to_dict()
    for key, value in settings.items():
        if key not in defaults:
            raise UserError(f"{path}: {key[:80]} is unknown to this version of peft; take the version that wrote it")
        if key not in FREE_KEYS and value and value != defaults[key]:
            raise UserError(f"{path}: {key} {json.dumps(value)[:200]} is not what main.py writes; train again")
    if settings.get("target_modules") not in targets:
        raise UserError(f"{path}: target_modules {str(settings.get('target_modules'))[:200]} is none of main.py's")
    trained_on = settings.get("base_model_name_or_path")
    if trained_on and Path(str(trained_on)).name != Path(base).name:
        raise UserError(f"{path}: base_model_name_or_path is {trained_on}, but run.json names {base}; train again")
