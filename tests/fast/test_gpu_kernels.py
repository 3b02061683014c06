"""Each Triton kernel against its twin in torch, and both against fp64: on the CPU in Triton's interpreter, on a GPU as
they run there."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, need_triton

from captioner.fast.kernels import choice
from captioner.fast.kernels.attention import Rows, attend, attend_one
from captioner.fast.kernels.dropout import Drop
from captioner.fast.kernels.head import softmax_nll
from captioner.fast.kernels.lora import add_parts, lora_backward, project_low
from captioner.fast.kernels.norm import add_and_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
pytestmark = pytest.mark.gpu
slow = pytest.mark.slow  # Triton's interpreter takes seconds: the quick tests have one case of each kernel
SEED = torch.tensor([123456789], device=DEVICE)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Also on the CPU."""
    need_triton()
    monkeypatch.setattr(choice, "use_kernels", lambda x: True)


def by_torch(function, *args, **options):
    """What the twin gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "use_kernels", lambda x: False)
        return function(*args, **options)


def make(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def check(result, expected, dtype):
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert (result.double() - expected.double()).norm() <= limit * expected.double().norm()


def draw_mask(rows, width, dropout, site=3):
    """(N, W) mask times scale, as project_low draws it: its products with unit matrices of rank 16."""
    x, columns, none = torch.ones(rows, width, device=DEVICE), [], torch.zeros(1, 16, device=DEVICE)
    for start in range(0, width, 16):
        unit = torch.zeros(16, width, device=DEVICE)
        unit[range(min(16, width - start)), range(start, min(start + 16, width))] = 1
        columns.append(x.new_empty(rows, 16))
        project_low(x, unit, columns[-1], Drop(dropout, SEED, site), none, none.clone())
    return torch.cat(columns, 1)[:, :width]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("groups", "rank", "relu", "programs"),
    [
        (3, 8, True, 1),
        pytest.param(1, 16, True, 528, marks=slow),
        pytest.param(2, 4, False, 1, marks=slow),
        pytest.param(3, 16, True, 4, marks=slow),
    ],
)
def test_lora_is_torchs(groups, rank, relu, programs, dtype, monkeypatch):
    """Of ranks that fill a kernel's product and of smaller ones, of one block of rows a program and of several."""
    monkeypatch.setattr("captioner.fast.kernels.lora.PROGRAMS", programs)
    rows, width, part, ranks, drop = 70, 200, 300, groups * rank, Drop(0.25, SEED, 3)
    torch.manual_seed(0)
    mask = draw_mask(rows, width, 0.25)
    x = make(rows, width, dtype=dtype).requires_grad_()
    a = make(ranks, width, dtype=dtype).requires_grad_()
    b = make(groups * part, rank, dtype=dtype)
    room = torch.full((rows, ranks + 8), 7.0, device=DEVICE, dtype=dtype)
    low = room[:, :ranks]  # as beside x
    beside = torch.zeros(groups * part, width + ranks, device=DEVICE, dtype=dtype)[:, width:]
    assert project_low(x.detach(), a.detach(), low, drop, b, beside).mask is None and (room[:, ranks:] == 7).all()
    expected = (x.double() * mask.double()) @ a.double().T
    check(low, expected, dtype)
    assert torch.equal(beside, torch.block_diag(*b.chunk(groups)))
    low_twin, beside_twin = torch.empty_like(low), torch.zeros_like(beside)
    project_low(x.detach(), a.detach(), low, Drop(0.0, SEED, 3), b, beside)
    by_torch(project_low, x.detach(), a.detach(), low_twin, Drop(0.0, SEED, 3), b, beside_twin)
    check(low, low_twin, dtype)
    assert torch.equal(beside, beside_twin)

    grad_x, grad_low = make(rows, width + ranks, dtype=dtype).split([width, ranks], 1)  # beside each other
    gradients = torch.autograd.grad(expected, (x, a), grad_low.double())
    wanted, twin = grad_x.double() + gradients[0].double(), grad_x.clone()
    grad_a = lora_backward(grad_x, x.detach(), grad_low, a.detach(), drop, relu)
    kept = drop._replace(mask=mask != 0)
    by_twin = by_torch(lora_backward, twin, x.detach(), grad_low, a.detach(), kept, relu)
    for grad, result in ((grad_x, grad_a), (twin, by_twin)):
        check(result, gradients[1], dtype)
        check(grad, wanted * (x > 0) if relu else wanted, dtype)
    assert torch.equal(lora_backward(None, x.detach(), grad_low, a.detach(), drop), grad_a)


def test_more_ranks_than_fit_are_torchs():
    """Its mask is kept then, and used again."""
    x, a, b, drop = make(9, 40), make(136, 40), make(5, 136), Drop(0.5, SEED, 3)
    low = x.new_empty(9, 136)
    drop = project_low(x, a, low, drop, b, torch.zeros_like(b))
    check(low, (x * drop.mask * 2) @ a.T, torch.float32)
    check(lora_backward(None, x, low, a, drop), low.T @ (x * drop.mask * 2), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [pytest.param(1, marks=slow), 40])
def test_parts_are_added_up(count, dtype):
    """And nothing that lies behind them."""
    room = make(count + 1, 7, 100)
    room[count:] = torch.nan
    parts = room[:count]
    total = add_parts(parts, dtype)
    assert total.dtype == dtype
    check(total, parts.sum(0), dtype)


@slow
def test_masks_differ_and_have_the_wanted_share():
    mask = draw_mask(192, 256, 0.05)
    assert mask.unique().tolist() == pytest.approx([0, 1 / 0.95], rel=1e-4)
    shares = (mask == 0).float().unflatten(0, (3, 64)).mean((1, 2))
    assert ((shares - 0.05).abs() < 4 * (0.05 * 0.95 / 64 / 256) ** 0.5).all()
    for other in (draw_mask(192, 256, 0.05, site=4), *(mask.roll(*by) for by in ((1, 0), (1, 1), (8, 1), (64, 0)))):
        assert abs(((mask == 0) & (other == 0)).float().mean() - 0.05**2) < 4 * (0.05**2 / 192 / 256) ** 0.5


@slow
def test_rows_and_columns_tell_nothing_of_each_other():
    """Numbers of a row and of a column make a value's: four at the corners of a rectangle must not hang together."""
    rows, width = 128, 256
    odd = (draw_mask(rows, width, 0.5) == 0).float() * 2 - 1
    sides = torch.stack([odd * odd.roll(down, 0) for down in (1, 2, 5, 31)])
    corners = torch.stack([sides * sides.roll(right, 2) for right in (1, 2, 3, 8, 101)])
    assert (corners.mean((2, 3)).abs() < 4.5 / (rows * width) ** 0.5).all()
    assert (odd.mean(0).abs() < 5 / rows**0.5).all() and (odd.mean(1).abs() < 5 / width**0.5).all()
    for share in (odd.mean(0), odd.mean(1)):  # of a column and of a row
        assert share.var().item() * (odd.numel() / len(share)) == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=slow), 0.5])
@pytest.mark.parametrize("with_sum", [True, pytest.param(False, marks=slow)])
def test_residual_norm_is_torchs(dropout, with_sum, dtype):
    rows, width, drop = 9, 200, Drop(dropout, SEED, 5)
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(width, device=DEVICE, dtype=dtype).requires_grad_(False)
    norm.weight.copy_(make(width)), norm.bias.copy_(make(width))
    zeros, ones = torch.zeros(rows, width, device=DEVICE), torch.ones(rows, width, device=DEVICE)
    mask = add_and_norm(zeros, ones, drop, norm)[0].double()
    assert (mask == 0).any() == (dropout > 0)
    x, h = (make(rows, width, dtype=dtype).requires_grad_() for _ in range(2))
    expected_sum = x.double() + h.double() * mask
    expected = F.layer_norm(expected_sum, (width,), norm.weight.double(), norm.bias.double(), norm.eps)
    grad_sum, grad = make(rows, width, dtype=dtype), make(rows, width + 3, dtype=dtype)[:, :width]
    loss = (expected * grad.double()).sum() + (expected_sum * grad_sum.double()).sum() * with_sum
    gradients = torch.autograd.grad(loss, (x, h), retain_graph=True)
    twin = [] if dropout else [lambda *args: by_torch(add_and_norm, *args)]  # which draws another mask
    for function in (add_and_norm, *twin):
        total, normed = function(x, h, drop, norm)
        check(total, expected_sum, dtype)
        check(normed, expected, dtype)
        grads = {normed: grad} | ({total: grad_sum} if with_sum else {})
        results = torch.autograd.grad(list(grads), (x, h), list(grads.values()))
        for result, gradient in zip(results, gradients, strict=True):
            check(result, gradient, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flashes", [False, True])
@pytest.mark.parametrize("width", [16, 80])
def test_attention_of_packed_rows_is_that_of_each(width, flashes, dtype, monkeypatch):
    """Of rows of different lengths, one of them empty, by flash attention where it can be had, and padded."""
    if not flashes:
        monkeypatch.setattr(choice, "can_flash", lambda q: False)
    torch.manual_seed(0)
    heads, longest = 2, 128
    starts = torch.tensor([0, 70, 75, 75, 108], device=DEVICE)
    joined = make(108, 3 * heads * width, dtype=dtype).requires_grad_()
    grad = make(108, heads * width, dtype=dtype)
    out = attend([joined], heads, 0.0, Rows.of(starts, longest, 108))
    (gradient,) = torch.autograd.grad(out, joined, grad)

    reference, expected = joined.detach().double().requires_grad_(), []
    for row in reference.split(starts.diff().tolist()):
        q, k, v = row.unflatten(1, (3, heads, width)).permute(1, 2, 0, 3)  # (heads, L, width)
        scores = q @ k.mT * width**-0.5
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
        expected.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    check(out, torch.cat(expected), dtype)
    check(gradient, torch.autograd.grad(torch.cat(expected), reference, grad.double())[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [pytest.param(16, marks=slow), 40, pytest.param(80, marks=slow)])
@pytest.mark.parametrize("position", [*(pytest.param(n, marks=slow) for n in (0, 5, 16)), 37])
def test_attention_of_one_token_is_torchs(position, width, dtype):
    """Key and value go into the cache; what is behind them is not read."""
    torch.manual_seed(0)
    rows, heads = 3, 2
    new, cache = make(rows, 3, heads, width, dtype=dtype), make(2, rows, heads, 40, width, dtype=dtype)
    cache[:, :, :, position:] = torch.nan
    seen = torch.cat([cache[..., :position, :], new[:, 1:].transpose(0, 1).unsqueeze(3)], 3)  # (2, n, H, L, D)
    position_there = torch.tensor([position], device=DEVICE)
    out = attend_one(new, *cache, position_there)
    q, k, v = new[:, 0].double().unsqueeze(2), *seen.double()
    check(out, F.scaled_dot_product_attention(q, k, v).squeeze(2), dtype)
    check(by_torch(attend_one, new, *cache.clone().nan_to_num(), position_there), out, dtype)
    assert torch.equal(cache[..., : position + 1, :], seen) and cache[..., position + 1 :, :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [52, pytest.param(5000, marks=slow)])
def test_softmax_nll_is_torchs(vocabulary, dtype):
    torch.manual_seed(0)
    logits = (3 * make(7, vocabulary)).to(dtype)
    targets = torch.tensor([0, 1, -100, vocabulary - 1, 3, -100, 2], device=DEVICE)
    reference = logits.double().requires_grad_()
    expected = F.cross_entropy(reference, targets, ignore_index=-100, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), reference)
    before = logits.clone()
    for function in (softmax_nll, lambda *args: by_torch(softmax_nll, *args)):
        logits = before.clone()
        check(function(logits, targets, -100), expected, torch.float32)
        assert torch.equal(logits, before)
        check(function(logits, targets, -100, 8.0), expected, torch.float32)
        check(logits, 8 * gradient, dtype)
        assert not logits[2].any()


@slow
def test_kernels_fit_into_a_small_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "shared_memory.py"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    taken = json.loads(run.stdout.splitlines()[-1])
    assert len(taken) == 3 and all(0 < kib <= 99 for kib in taken.values()), taken


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("by_kernels", [True, False])
@pytest.mark.parametrize("target", ["both", "lm", "qformer"])
def test_recorded_passes_are_the_passes(tiny_checkpoint, target, by_kernels, monkeypatch):
    """Of two sizes in turn, added up, with dropout: losses and gradients to the last bit."""
    from accelerate.utils import send_to_device
    from transformers import Blip2ForConditionalGeneration

    from captioner.blip2.loading import load_config
    from captioner.blip2.lora import add_lora
    from captioner.blip2.vit import take_vision_out
    from captioner.fast.packing import PackedCollator
    from captioner.fast.speed import FastStep, join_weights

    torch.manual_seed(0)
    monkeypatch.setattr(choice, "use_kernels", lambda x: by_kernels)
    config = load_config(tiny_checkpoint)
    model = Blip2ForConditionalGeneration(config).to(DEVICE, torch.bfloat16).requires_grad_(False)
    take_vision_out(model)
    model = add_lora(model, target, 8, 32, 0.3).train()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    join_weights(model)
    collate, positions = (
        PackedCollator(config),
        (config.vision_config.image_size // config.vision_config.patch_size) ** 2,
    )
    outputs = torch.zeros(positions + 1, config.vision_config.hidden_size, dtype=torch.bfloat16, device=DEVICE)
    batches = []
    for lengths in ((5, 9), (30, 40), (6, 8)):
        ids = [torch.randint(10, 100, (length,)).tolist() for length in lengths]
        rows = [{"pixel_values": torch.randn_like(outputs), "caption_ids": row} for row in ids]
        batches.append(send_to_device(collate(rows), DEVICE))
    results = []
    for is_recorded in (False, True):
        step = FastStep(model, is_recorded)
        torch.manual_seed(1)
        for _ in range(2):  # optimiser steps
            step.zero_grad()
            losses = [step(batch, 100) for batch in batches]
            results.append((torch.stack(losses), step.whole.grad.clone()))
    assert results[0][1].norm() > 0 and not torch.equal(results[0][1], results[1][1])  # other masks
    for plain, recorded in zip(results[:2], results[2:], strict=True):
        assert all(map(torch.equal, plain, recorded))
