"""A GPU that takes itself for a T4: capability 7.5, and what a T4 has not raises an error where it is called.

That is bf16 in matrix products, flash attention, and Triton's matrix products. Memory is left to benchmarks.gpu.
"""

import torch
import torch.nn.functional as F

PRODUCTS = {F: ["linear"], torch: ["matmul", "mm", "bmm", "addmm"], torch.Tensor: ["__matmul__", "matmul", "addmm_"]}
FREE_GIB = 14.6  # that a T4 leaves to a program


class NotOnT4(RuntimeError):
    """What was called does not exist on a T4."""


def pretend() -> None:
    """For the rest of this process."""
    torch.cuda.get_device_capability = lambda device=None: (7, 5)
    torch.cuda.is_bf16_supported = lambda including_emulation=True: False
    for owner, names in PRODUCTS.items():
        for name in names:
            setattr(owner, name, refuse_bf16(getattr(owner, name)))
    torch.ops.aten._flash_attention_forward = refuse_flash
    F.scaled_dot_product_attention = attend_as_t4(F.scaled_dot_product_attention)
    refuse_triton_products()


def refuse_bf16(function):
    def refuse(*args, **options):
        if any(torch.is_tensor(arg) and arg.dtype == torch.bfloat16 for arg in args):
            raise NotOnT4(f"{function.__name__} in bf16")
        return function(*args, **options)

    return refuse


def refuse_flash(*args, **options):
    raise NotOnT4("flash attention")


def attend_as_t4(attend):
    """scaled_dot_product_attention, which picks what a T4 has whatever it may pick from."""

    def attend_without(*args, **options):
        before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            return attend(*args, **options)
        finally:
            torch.backends.cuda.enable_flash_sdp(before[0])
            torch.backends.cuda.enable_cudnn_sdp(before[1])

    return attend_without


def refuse_triton_products() -> None:
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def refuse(self, *args, **options):
        if "tl.dot" in self.src:
            raise NotOnT4(f"tl.dot in {self.fn.__name__}")
        return run(self, *args, **options)

    JITFunction.run = refuse
