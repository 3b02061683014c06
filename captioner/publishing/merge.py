"""The model with the adapter merged in.

merge_adapter(Path("blip2-finetuned"), Path("blip2-finetuned-merged"))   # needs no peft to load
"""

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError

from captioner.blip2.loading import count_parameters, load_config, load_generation, load_processor, load_weights
from captioner.blip2.lora import LORA_TARGETS
from captioner.blip2.trust import check_adapter_folder
from captioner.data.run_record import ADAPTER_WEIGHTS, read_run
from captioner.publishing.records import check_adapter, take_names
from captioner.runtime.errors import UserError
from captioner.runtime.files import find_existing, hash_file, measure_free, read_json, split_revision, write_json
from captioner.runtime.machine import measure_memory

MERGED = "merged.json"  # what tells a folder that merge_adapter wrote from any other
MERGING_MARGIN = 1_000_000_000  # bytes beside the weights; a model of 3.2 GB took 0.3 GB more than that in memory


def merge_adapter(folder: Path, output: Path) -> None:
    """Write the base model with the adapter merged into it, unquantised in float32, with processor and settings.

    Merged into NF4 weights the adapter would be rounded with them, and other captions come out. The folder gets its
    name only when all is written. Raises UserError when `output` holds anything but an earlier merged model, when disk
    or memory are too small, or when base or adapter can't be read.
    """
    check_adapter(folder)
    output = output.resolve()
    check_replaceable(output)
    run = read_run(folder)
    source = run["config"]["model"]
    check_adapter_folder(folder, LORA_TARGETS.values(), split_revision(source)[0])
    check_room(output, count_parameters(load_config(source)) * torch.float32.itemsize)

    processor = load_processor(folder)
    model = load_weights(source, run["config"].get("image_size"), dtype=torch.float32)
    temporary = output.with_name(f".{output.name}.merging")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        merged = PeftModel.from_pretrained(model, folder).merge_and_unload(safe_merge=True)
        merged.generation_config = load_generation(folder)
        merged.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        write_merged(temporary, folder, run)
        if output.exists():
            shutil.rmtree(output)
        temporary.rename(output)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: can't be merged into {source} and written to {output} ({reason})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(output: Path) -> None:
    """Raise UserError unless `output` is not there, an empty folder, or all of it was written by merge_adapter."""
    if not output.exists():
        return
    found = {path.name for path in output.iterdir()} if output.is_dir() else {output.name}
    ours = set()
    if MERGED in found and output.is_dir():
        ours = {MERGED, *read_json(output / MERGED, "name another folder").get("files", [])}
    if strange := sorted(found - ours):
        raise UserError(
            f"{output}: is there, and is no merged model of an earlier run ({strange[0]} is none of its files); move "
            "it away, or name another folder"
        )


def write_merged(merged: Path, folder: Path, run: dict) -> None:
    """Say in a merged folder what it is made of, and list its files."""
    record = {
        "base": take_names(run["config"]["model"], only_absolute=True),
        "run_name": run.get("run_name"),
        "adapter_sha256": hash_file(folder / ADAPTER_WEIGHTS),
        "files": sorted(path.name for path in merged.iterdir()),
    }
    write_json(merged / MERGED, record)


def check_room(output: Path, size: int) -> None:
    """Raise UserError unless a model of `size` bytes can be written at `output`, and be held in memory."""
    parent = find_existing(output.parent)
    disk, memory = measure_free(parent), measure_memory()
    need = size + MERGING_MARGIN
    if disk is not None and disk < need:
        raise UserError(
            f"{parent}: {disk / 1e9:.1f} GB free, the merged model needs {need / 1e9:.1f} GB; free some space, or "
            "merge into a folder elsewhere"
        )
    if memory < need:
        raise UserError(
            f"{memory / 1e9:.1f} GB of memory free, merging in float32 needs {need / 1e9:.1f} GB; close other "
            "programs, or merge on a larger machine"
        )
