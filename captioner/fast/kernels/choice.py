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
