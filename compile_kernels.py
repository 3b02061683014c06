"""Has Triton compile what training takes of gpu_kernels.py, beside main.py, which imports and loads meanwhile.

main.py starts this process before its own imports. Compiling takes a quarter of a minute; Triton keeps the results.
They depend on widths and types alone: a small pass through a model of the same widths, with a layer or two of random
weights, compiles them all. Whatever goes wrong here does no harm, since main.py compiles what is missing.
"""

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ROOM = 8 * 2**30  # bytes of GPU memory that must be free: main.py loads its model there meanwhile
WAITING = 120  # seconds that main.py waits at most, before it compiles itself


def start(config) -> subprocess.Popen | None:
    """Start compiling for a TrainConfig; None where it is of no use, or an earlier run has done it."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if config.fast_step == "off" or not is_first or shutil.which("nvidia-smi") is None:
        return None
    lora = (config.lora_target, config.lora_rank, config.lora_alpha, config.lora_dropout)
    stamp = find_stamp(config.model, *lora)
    if stamp.exists():
        return None
    command = [sys.executable, __file__, stamp, config.model, *lora]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(process: subprocess.Popen | None) -> None:
    """Wait for what start() gave."""
    if process is not None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(WAITING)


def find_stamp(*settings) -> Path:
    """The file that says that the kernels for these settings are in Triton's cache."""
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    versions = [importlib.metadata.version(package) for package in ("torch", "bitsandbytes", "peft", "transformers")]
    kernels = (Path(__file__).parent / "gpu_kernels.py").read_bytes()
    return cache / f"blip2-{hashlib.sha256(repr((settings, versions)).encode() + kernels).hexdigest()[:32]}"


def run_small_model(model_config, lora: tuple[str, int, int, float], device, dtype) -> None:
    """A pass with gradients and one without through a small model of the widths of `model_config`."""
    import torch
    from transformers import Blip2ForConditionalGeneration

    from caption_loss import caption_nll
    from model import add_lora
    from speed import join_weights
    from vision_store import shape_outputs, take_vision_out

    model_config.text_config.num_hidden_layers = model_config.vision_config.num_hidden_layers = 1
    model_config.qformer_config.num_hidden_layers = model_config.qformer_config.cross_attention_frequency  # one looks
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Blip2ForConditionalGeneration(model_config).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    take_vision_out(model)
    model = add_lora(model, *lora)
    join_weights(model)
    text, queries = model_config.text_config, model_config.num_query_tokens
    ids = torch.full((1, queries + 64), text.eos_token_id, device=device)  # enough for attention's largest blocks
    outputs = torch.zeros(1, *shape_outputs(model_config.vision_config), dtype=dtype, device=device)
    batch = {"pixel_values": outputs, "input_ids": ids, "labels": ids}
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    torch.autograd.grad(caption_nll(model.train(), **batch).sum(), weights)
    with torch.no_grad():
        caption_nll(model.eval(), **batch)


def main(stamp: str, source: str, target: str, rank: str, alpha: str, dropout: str) -> None:
    from config import import_bitsandbytes

    import_bitsandbytes()  # before transformers and peft do
    import torch

    from layers import use_kernels
    from model import load_config, pick_device, pick_dtype

    device = pick_device()
    if (
        device.type == "cuda"
        and torch.cuda.mem_get_info(device)[0] > ROOM
        and use_kernels(torch.empty(0, device=device))
    ):
        lora = (target, int(rank), int(alpha), float(dropout))
        run_small_model(load_config(source), lora, device, pick_dtype(device))
        Path(stamp).parent.mkdir(parents=True, exist_ok=True)
        Path(stamp).touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
