"""Has Triton compile what training takes of gpu_kernels.py, beside main.py, which imports and loads meanwhile.

main.py starts this process before its own imports. Compiling takes a quarter of a minute; Triton keeps the results.
They depend on widths and types alone: a small pass through a model of the same widths, with a layer or two of random
weights in 16 bits, compiles them. What is missing, as with weights that stay in NF4, main.py compiles itself.
A second process does the same without the Q-Former, so that the first finds the language model's kernels there; then it
compiles what captions take beside. Nobody waits for it: what it has not done, eval.py compiles itself.
"""

import copy
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__":  # run by its path, so that it may start in any folder
    sys.path[0] = str(Path(__file__).parents[2])

from captioner.runtime.processes import is_sharded

ROOM = 32 * 2**30  # bytes of GPU memory that must be free: a small model beside main.py's is no matter then
WAITING = 120  # seconds that main.py waits at most
# that decide what is compiled
FILES = ("gpu_kernels.py", "layers.py", "caption_loss.py", "speed.py", "generation.py", "compile_kernels.py")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
CORES = 8  # from which on a second process helps
GPUS = Path("/proc/driver/nvidia/gpus")  # where Linux tells their models


def start(config) -> subprocess.Popen | None:
    """Start compiling for a TrainConfig; None where it is of no use, or an earlier run has done it."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if is_sharded() or not is_first or shutil.which("nvidia-smi") is None:
        return None
    lora = (config.lora.lora_target, config.lora.lora_rank, config.lora.lora_alpha, config.lora.lora_dropout)
    with suppress(OSError, RuntimeError, importlib.metadata.PackageNotFoundError):  # main.py can do without
        stamp = find_stamp(config.base.model, *lora)
        if not stamp.exists():
            command = [sys.executable, __file__, stamp, config.base.model, *lora]
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


def make_small_model(model_config, lora: tuple[str, int, int, float], device, dtype, qformer: bool = True):
    """A model of the widths of `model_config` with LoRA, its ViT taken out, and without a Q-Former unless wanted."""
    import torch
    from transformers import Blip2ForConditionalGeneration

    from captioner.blip2.lora import add_lora
    from captioner.blip2.vision import take_vision_out

    model_config = copy.deepcopy(model_config)
    model_config.vision_config.num_hidden_layers = 1
    model_config.text_config.num_hidden_layers = 2  # the first may need no gradient of what it reads
    looking = model_config.qformer_config.cross_attention_frequency  # of so many layers one looks at the image
    model_config.qformer_config.num_hidden_layers = looking if qformer else 0
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Blip2ForConditionalGeneration(model_config).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    take_vision_out(model)
    return add_lora(model, *lora)


def make_outputs(model):
    """(P, D) what the ViT might give for an image."""
    import torch

    from captioner.fast.features import shape_outputs

    return torch.zeros(*shape_outputs(model.config.vision_config), dtype=model.dtype, device=model.device)


def train_small_model(model) -> None:
    """A pass with gradients and one without."""
    import torch
    from accelerate.utils import send_to_device

    from captioner.fast.caption_loss import caption_nll
    from captioner.fast.packing import PackedCollator
    from captioner.fast.speed import join_weights

    join_weights(model)
    row = {"pixel_values": make_outputs(model), "caption_ids": [model.config.text_config.eos_token_id] * 64}
    batch = send_to_device(PackedCollator(model.config)([row]), model.device)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    torch.autograd.grad(caption_nll(model.train(), **batch).sum(), weights)
    with torch.no_grad():
        caption_nll(model.eval(), **batch)


def caption_small_model(model) -> None:
    """Two tokens, which eval.py's kernels write."""
    from captioner.fast.generation import FastGenerator

    FastGenerator(model.eval(), 8).generate(make_outputs(model)[None], 2)


def is_shared() -> bool:
    """Whether GPUs let several processes in."""
    query = ["nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader"]
    modes = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    return set(modes) == {"Default"}


def main(stamp: str, source: str, target: str, rank: str, alpha: str, dropout: str, helps: str = "") -> None:
    """`helps`: compile for the language model alone and then for captions, and leave the stamp to another process."""
    if not is_shared():
        return
    from captioner.runtime.processes import count_cores

    if not helps and target != "qformer" and count_cores() >= CORES:
        helper = [sys.executable, __file__, stamp, source, "lm", rank, alpha, dropout, "helps"]
        subprocess.Popen(helper, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    import torch

    from captioner.blip2.loading import load_config, pick_device, pick_dtype
    from captioner.fast.layers import use_kernels

    device = pick_device()
    if use_kernels(torch.empty(0, device=device)):
        if torch.cuda.mem_get_info(device)[0] < ROOM:
            return
        lora = (target, int(rank), int(alpha), float(dropout))
        model_config, dtype = load_config(source), pick_dtype(device)
        train_small_model(make_small_model(model_config, lora, device, dtype, qformer=not helps))
        if helps:
            caption_small_model(make_small_model(model_config, ("both", *lora[1:]), device, dtype))
    if not helps:
        Path(stamp).parent.mkdir(parents=True, exist_ok=True)
        Path(stamp).touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
