"""KiB of shared memory that each Triton kernel with a matrix product takes on an RTX 30 or 40 (capability 8.6): JSON.

python tests/shared_memory.py      # compiles for that GPU; none is needed
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from captioner.fast.kernels import lora

POINTERS = {"seed": "*i64", "sums": "*fp32"}
INTEGERS = ("site", "level", "rows", "width", "height", "blocks")


def measure(kernel, constants: dict, **options) -> float:
    """KiB of a kernel for bf16, with strides that are multiples of 16."""
    signature, known, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], known[(place,)] = "constexpr", constants[name]
        elif name == "scale":
            signature[name] = "fp32"
        elif name in INTEGERS or name.endswith("stride"):
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
    taken = {}
    projections = [
        ("_project_low", lora.PROJECT | {"num_stages": lora.pick_stages(rank)}, {"R": rank, "FULL": rank})
        for rank in (64, lora.LARGEST_SUM)
    ]
    for name, sizes, constants in (
        *projections,
        (
            "_lora_backward",
            lora.BACKWARD,
            {"ADDS": True, "RELU": True, "K": lora.LARGEST_SUM, "ALL": lora.LARGEST_SUM},
        ),
    ):
        options = {key: value for key, value in sizes.items() if key.startswith("num_")}
        tiles = {key: value for key, value in sizes.items() if key not in options}
        taken[f"{name} {constants}"] = measure(getattr(lora, name), constants | tiles, **options)
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
