"""Has Triton compile what training takes of gpu_kernels.py, beside main.py, which imports and loads meanwhile.

main.py starts this process before its own imports. Compiling takes a quarter of a minute; Triton keeps the results.
They depend on widths and types alone: a small pass through a model of the same widths, with a layer or two of random
weights in 16 bits, compiles them. What is missing, as with weights that stay in NF4, main.py compiles itself.
"""

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from config import import_bitsandbytes, is_sharded

ROOM = 32 * 2**30  # bytes of GPU memory that must be free: a small model beside main.py's is no matter then
WAITING = 120  # seconds that main.py waits at most
FILES = ("gpu_kernels.py", "layers.py", "caption_loss.py", "compile_kernels.py")  # that decide what is compiled
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
GPUS = Path("/proc/driver/nvidia/gpus")  # where Linux tells their models


def start(config) -> subprocess.Popen | None:
    """Start compiling for a TrainConfig; None where it is of no use, or an earlier run has done it."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if config.fast_step == "off" or is_sharded() or not is_first or shutil.which("nvidia-smi") is None:
        return None
    lora = (config.lora_target, config.lora_rank, config.lora_alpha, config.lora_dropout)
    with suppress(OSError, RuntimeError, importlib.metadata.PackageNotFoundError):  # main.py can do without
        stamp = find_stamp(config.model, *lora)
        if not stamp.exists():
            command = [sys.executable, __file__, stamp, config.model, *lora]
            return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return None


def finish(process: subprocess.Popen | None) -> None:
    """Wait for what start() gave, but not too long."""
    if process is not None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(WAITING)
        process.kill()


def find_stamp(*settings) -> Path:
    """The file that says that the kernels for these settings are in Triton's cache, or that there are none."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    models = [line for file in sorted(GPUS.glob("*/information")) for line in file.read_text().splitlines()[:1]]
    known = repr((settings, models, [importlib.metadata.version(package) for package in PACKAGES])).encode()
    known += b"".join((Path(__file__).parent / name).read_bytes() for name in FILES)
    return cache / f"blip2-{hashlib.sha256(known).hexdigest()[:32]}"


def run_small_model(model_config, lora: tuple[str, int, int, float], device, dtype) -> None:
    """A pass with gradients and one without through a small model of the widths of `model_config`."""
    import torch
    from accelerate.utils import send_to_device
    from transformers import Blip2ForConditionalGeneration

    from caption_loss import caption_nll
    from model import PackedCollator, add_lora
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
    text = model_config.text_config
    outputs = torch.zeros(*shape_outputs(model_config.vision_config), dtype=dtype, device=device)
    batch = PackedCollator(model_config)([{"pixel_values": outputs, "caption_ids": [text.eos_token_id] * 64}])
    batch = send_to_device(batch, device)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    torch.autograd.grad(caption_nll(model.train(), **batch).sum(), weights)
    with torch.no_grad():
        caption_nll(model.eval(), **batch)


def is_shared() -> bool:
    """Whether GPUs let several processes in."""
    query = ["nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader"]
    modes = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    return set(modes) == {"Default"}


def main(stamp: str, source: str, target: str, rank: str, alpha: str, dropout: str) -> None:
    if not is_shared():
        return
    import_bitsandbytes()  # before transformers and peft do
    import torch

    from layers import use_kernels
    from model import load_config, pick_device, pick_dtype

    device = pick_device()
    if use_kernels(torch.empty(0, device=device)):
        if torch.cuda.mem_get_info(device)[0] < ROOM:
            return
        lora = (target, int(rank), int(alpha), float(dropout))
        run_small_model(load_config(source), lora, device, pick_dtype(device))
    Path(stamp).parent.mkdir(parents=True, exist_ok=True)
    Path(stamp).touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
