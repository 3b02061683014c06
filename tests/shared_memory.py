"""KiB of shared memory that each Triton kernel takes on an RTX 30 or 40 (compute capability 8.6), as JSON.

python tests/shared_memory.py      # compiles for that GPU; none is needed
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from captioner.fast import gpu_kernels

FLOATS = ("scale", "kept_scale")
POINTERS = {"seed": "*i64", "starts": "*i64", "sums": "*fp32", "along": "*fp32"}
INTEGERS = ("site", "level", "rows", "length", "key_length", "positions", "heads", "width", "height", "blocks", "part")
STAGES = 2  # that gpu_kernels.pick_stages gives there


def measure(kernel, constants: dict, **options) -> float:
    """KiB of a kernel for bf16, with strides that are multiples of 16."""
    signature, known, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], known[(place,)] = "constexpr", constants[name]
        elif name in FLOATS:
            signature[name] = "fp32"
        elif name in INTEGERS or name.endswith(("stride", "_group")):
            signature[name] = "i32"
        else:
            signature[name] = POINTERS.get(name, "*bf16")
        if signature[name].startswith("*") or name == "width" or name.endswith("stride"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, known, aligned), target=GPUTarget("cuda", 86, 32), options=options
    )
    return compiled.metadata.shared / 1024


def main() -> None:
    taken, rank = {}, max(gpu_kernels.RANKS)
    opt = {"CAUSAL": True, "DROPS": False, "PACKED": True, "D": 64, "E": 16}
    qformer = {"CAUSAL": False, "DROPS": True, "PACKED": False, "D": 64, "E": 0}
    for heads in (opt, qformer):
        most = gpu_kernels.ATTEND["MOST"]
        for name in ("_attend", "_attend_backward_keys", "_attend_backward_queries"):
            constants, warps = heads | {"QUERIES": most, "KEYS": most}, gpu_kernels.ATTEND["num_warps"]
            options = {"num_warps": warps, "num_stages": STAGES}
            taken[f"{name} {heads['D']} {heads['E']}"] = measure(getattr(gpu_kernels, name), constants, **options)
    for name, sizes, constants in (
        (
            "_project_low",
            gpu_kernels.PROJECT | {"num_stages": STAGES},
            {"DROPS": True, "PLACES": True, "PLACED": gpu_kernels.PLACED},
        ),
        ("_add_low_rank", gpu_kernels.ADD, {"RELU": True}),
        ("_lora_backward", gpu_kernels.BACKWARD, {"DROPS": True, "ADDS": True, "RELU": True, "G": 3}),
    ):
        options = {key: value for key, value in sizes.items() if key.startswith("num_")}
        tiles = {key: value for key, value in sizes.items() if key not in options}
        taken[name] = measure(getattr(gpu_kernels, name), constants | tiles | {"R": rank}, **options)
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
