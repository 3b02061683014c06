"""Whether Triton's kernels are used: the one place that decides it."""

import functools
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without: the kernels' definitions are read all the same
    tl = SimpleNamespace(constexpr=None)
    triton = SimpleNamespace(jit=lambda kernel=None, **_: kernel or (lambda kernel: kernel), runtime=None)

LARGE_SHARED_MEMORY = 160 * 2**10  # bytes of a program; A100 and H100 have more, other GPUs 99 KiB
# arguments that no kernel is compiled anew for
VARYING = ("site", "level", "rows", "height", "blocks")


def use_kernels(x: Tensor) -> bool:
    """Whether Triton's kernels take x: on a GPU from Ampere on, where one of them can be built and run."""
    return x.is_cuda and _can_build(x.device.index)


@functools.cache
def _can_build(index: int) -> bool:
    """Tried with the smallest kernel, as building takes a C compiler and what else a machine may lack."""
    if triton.runtime is None or torch.cuda.get_device_capability(index) < (8, 0):
        return False
    try:
        values = torch.ones(8, device=f"cuda:{index}")
        _double[(1,)](values, VALUES=8)
        return values.tolist() == [2.0] * 8
    except Exception as error:  # of a compiler, a driver, a file system
        reason = " ".join(str(error).split())[:200]
        print(f"Triton's kernels can't be built here ({type(error).__name__}: {reason}): torch's own are used")
        return False


@triton.jit
def _double(values, VALUES: tl.constexpr):
    place = values + tl.arange(0, VALUES)
    tl.store(place, 2 * tl.load(place))


def can_flash(x: Tensor) -> bool:
    """Whether torch's flash attention takes heads of x (..., width)."""
    if not x.is_cuda or x.dtype == torch.float32 or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0) and x.shape[-1] % 8 == 0 and x.shape[-1] <= 256


def pick_stages(device: torch.device) -> int:
    """How many blocks a loop has on their way at once: fewer on GPUs with little shared memory (RTX 30 and 40, L4)."""
    return _pick_stages(device.index) if device.type == "cuda" else 1


@functools.cache
def _pick_stages(index: int) -> int:
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return 3 if properties["max_shared_mem"] >= LARGE_SHARED_MEMORY else 2
