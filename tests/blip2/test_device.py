"""Which GPUs are refused: those that this torch has no kernels for."""

import pytest
import torch

from captioner.blip2.loading import check_architecture
from captioner.runtime.errors import UserError

CU128 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.fixture
def gpu(monkeypatch):
    """gpu(name, capability, built): the GPU that torch sees, and the architectures that it was built for."""

    def pretend(name: str, capability: tuple[int, int], built: list[str]) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
        return torch.device("cuda", 0)

    return pretend


@pytest.mark.parametrize(
    ("name", "capability", "built"),
    [
        ("Tesla T4", (7, 5), CU128),
        ("L4, by the code for 8.6", (8, 9), CU128),
        ("Tesla P100", (6, 0), ["sm_50", "sm_60", "sm_70"]),
        ("one to come, by PTX", (13, 0), CU128),
        ("H100, by its own features", (9, 0), ["sm_90a"]),
        ("ROCm", (9, 4), ["gfx942"]),
        ("a build that tells nothing", (7, 5), []),
    ],
)
def test_a_gpu_with_kernels_is_taken(gpu, name, capability, built):
    check_architecture(gpu(name, capability, built))


@pytest.mark.parametrize(
    ("name", "capability", "built"),
    [
        ("Tesla P100-PCIE-16GB", (6, 0), CU128),
        ("Tesla V100", (7, 0), CU128),
        ("one to come, without PTX", (13, 0), CU128[:-1]),
    ],
)
def test_a_gpu_without_kernels_is_refused_with_the_remedy(gpu, name, capability, built):
    with pytest.raises(UserError) as refused:
        check_architecture(gpu(name, capability, built))
    said = str(refused.value)
    assert name in said and f"sm_{capability[0]}{capability[1]}" in said
    assert "T4" in said and "cu126" in said


def test_a_script_refuses_it_before_anything_else(gpu, monkeypatch):
    from captioner.blip2.loading import pick_device

    gpu("Tesla P100-PCIE-16GB", (6, 0), CU128)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(UserError, match="Tesla P100"):
        pick_device()
