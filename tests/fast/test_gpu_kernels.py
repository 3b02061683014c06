"""The Triton kernels against torch: on the CPU in Triton's interpreter, on a GPU as they run there."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, import_kernels

gpu_kernels = import_kernels()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
slow = pytest.mark.slow  # Triton's interpreter takes seconds: the quick tests have one case of each kernel
SEED = torch.tensor([123456789], device=DEVICE)


def make(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def check(result, expected, dtype):
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert (result.double() - expected.double()).norm() <= limit * expected.double().norm()


def masks_of(groups, rows, width, dropout, site=3):
    """(G, N, W) masks times scale, as project_low draws them: its products with unit matrices of rank 16."""
    x, columns = torch.ones(rows, width, device=DEVICE), []
    for start in range(0, width, 16):
        unit = torch.zeros(16, width, device=DEVICE)
        unit[range(min(16, width - start)), range(start, min(start + 16, width))] = 1
        columns.append(x.new_empty(groups, rows, 16))
        gpu_kernels.project_low(x, unit.repeat(groups, 1), dropout, SEED, site, columns[-1])
    return torch.cat(columns, 2)[:, :, :width]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("groups", "relu", "programs"),
    [
        (1, True, 1),
        pytest.param(1, True, 1056, marks=slow),
        pytest.param(2, False, 1, marks=slow),
        pytest.param(3, True, 4, marks=slow),
    ],
)
def test_lora_is_torchs(groups, relu, programs, dtype, monkeypatch):
    """Also where a program works on several blocks of rows, the next of which it reads ahead."""
    monkeypatch.setattr("captioner.fast.gpu_kernels.PROGRAMS", programs)
    rows, width, part, rank = 70, 200, 64, 16
    torch.manual_seed(0)
    masks = masks_of(groups, rows, width, 0.25)
    x = make(rows, width, dtype=dtype).requires_grad_()
    a = make(groups * rank, width, dtype=dtype).requires_grad_()
    room = torch.zeros(rows, groups * rank, device=DEVICE, dtype=dtype)
    low = room.unflatten(1, (groups, rank)).transpose(0, 1)  # as beside x
    gpu_kernels.project_low(x.detach(), a.detach(), 0.25, SEED, 3, low)
    inputs = x.double() * masks.double()  # (G, N, W)
    expected = torch.bmm(inputs, a.double().view(groups, rank, width).mT)
    check(low, expected, dtype)

    b, out = make(groups * part, rank, dtype=dtype), make(rows, groups * part, dtype=dtype)
    beside = torch.zeros(groups * part, width + groups * rank, device=DEVICE, dtype=dtype)[:, width:]
    again = torch.empty_like(low)
    gpu_kernels.project_low(x.detach(), a.detach(), 0.25, SEED, 3, again, b, beside)
    assert torch.equal(again, low)
    assert torch.equal(beside, torch.block_diag(*b.chunk(groups)))

    added = out.double() + torch.cat(list(torch.bmm(low.double(), b.double().view(groups, part, rank).mT)), 1)
    gpu_kernels.add_low_rank(out, low.contiguous(), b, relu)
    check(out, added.relu() if relu else added, dtype)

    both = make(rows, width + groups * rank, dtype=dtype)  # beside each other
    grad_x, grad_low = both.split([width, groups * rank], 1)
    grad_low = grad_low.unflatten(1, (groups, rank)).transpose(0, 1)
    gradients = torch.autograd.grad(expected, (x, a), grad_low.double())
    wanted = grad_x.double() + gradients[0].double()
    grad_a = gpu_kernels.lora_backward(grad_x, x.detach(), grad_low, a.detach(), 0.25, SEED, 3, relu)
    check(grad_a, gradients[1], dtype)
    check(grad_x, wanted * (x > 0) if relu else wanted, dtype)
    assert torch.equal(gpu_kernels.lora_backward(None, x.detach(), grad_low, a.detach(), 0.25, SEED, 3), grad_a)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [pytest.param(1, marks=slow), 40])
def test_parts_are_added_up(count, dtype):
    """And nothing that lies behind them."""
    room = make(count + 1, 7, 100)
    room[count:] = torch.nan
    parts = room[:count]
    total = gpu_kernels.add_parts(parts, dtype)
    assert total.dtype == dtype
    check(total, parts.sum(0), dtype)


@slow
def test_masks_differ_and_have_the_wanted_share():
    masks = masks_of(3, 64, 256, 0.05)
    assert masks.unique().tolist() == pytest.approx([0, 1 / 0.95], rel=1e-4)
    shares = (masks == 0).float().mean((1, 2))
    assert ((shares - 0.05).abs() < 4 * (0.05 * 0.95 / 64 / 256) ** 0.5).all()
    together = ((masks[0] == 0) & (masks[1] == 0)).float().mean()
    assert abs(together - 0.05**2) < 4 * (0.05**2 / 64 / 256) ** 0.5
    for other in (masks_of(1, 64, 256, 0.05, site=4)[0], masks[0].roll(1, 0), masks[0].roll(1, 1), masks[0].roll(8, 1)):
        assert abs(((masks[0] == 0) & (other == 0)).float().mean() - 0.05**2) < 4 * (0.05**2 / 64 / 256) ** 0.5


@slow
def test_rows_and_columns_tell_nothing_of_each_other():
    """Numbers of a row and of a column make a value's: four at the corners of a rectangle must not hang together."""
    rows, width = 128, 256
    odd = (masks_of(1, rows, width, 0.5)[0] == 0).float() * 2 - 1
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
    rows, width = 9, 200
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(width, device=DEVICE, dtype=dtype).requires_grad_(False)
    norm.weight.copy_(make(width)), norm.bias.copy_(make(width))
    zeros, ones = torch.zeros(rows, width, device=DEVICE), torch.ones(rows, width, device=DEVICE)
    mask = gpu_kernels.residual_norm(zeros, ones, dropout, SEED, 5, norm)[0].double()
    assert (mask == 0).any() == (dropout > 0)
    x, h = (make(rows, width, dtype=dtype).requires_grad_() for _ in range(2))
    total, normed, moments = gpu_kernels.residual_norm(x.detach(), h.detach(), dropout, SEED, 5, norm, room=3)
    expected_sum = x.double() + h.double() * mask
    expected = F.layer_norm(expected_sum, (width,), norm.weight.double(), norm.bias.double(), norm.eps)
    check(total, expected_sum, dtype)
    check(normed, expected, dtype)
    grad_sum, grad = make(rows, width, dtype=dtype), make(rows, width + 3, dtype=dtype)[:, :width]
    loss = (expected * grad.double()).sum() + (expected_sum * grad_sum.double()).sum() * with_sum
    gradients = torch.autograd.grad(loss, (x, h))
    results = gpu_kernels.residual_norm_backward(
        grad_sum if with_sum else None, grad, total, moments, dropout, SEED, 5, norm.weight
    )
    for result, gradient in zip(results, gradients, strict=True):
        check(result, gradient, dtype)


def attention_masks(length, keys, heads, is_causal, dropout, site):
    """(B, heads, L, S) masks times scale: equal scores over values that are a unit matrix give the kept shares."""
    nothing = torch.zeros(2, max(length, keys), heads * keys, device=DEVICE)
    unit = torch.eye(keys, device=DEVICE).repeat(2, 1, heads)
    shares, _ = gpu_kernels.attend(nothing[:, :length], nothing[:, :keys], unit, heads, is_causal, dropout, SEED, site)
    seen = torch.arange(1, length + 1, device=DEVICE) if is_causal else torch.full((length,), keys, device=DEVICE)
    return shares.unflatten(-1, (heads, keys)).transpose(1, 2).double() * seen[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("length", "keys", "heads", "width", "is_causal", "dropout"),
    [
        (33, 33, 2, 80, True, 0.3),
        (8, 140, 2, 16, False, 0.3),
        pytest.param(70, 70, 2, 40, True, 0.0, marks=slow),
        pytest.param(33, 33, 1, 64, True, 0.3, marks=slow),
        pytest.param(20, 20, 2, 16, False, 0.0, marks=slow),
    ],
)
def test_attention_is_torchs(length, keys, heads, width, is_causal, dropout, dtype):
    torch.manual_seed(0)
    joined = [(length, 3)] if length == keys else [(length, 1), (keys, 2)]
    inputs = [make(2, size, parts * heads * width, dtype=dtype) for size, parts in joined]
    gradients = [torch.full_like(part, torch.nan) for part in inputs]
    q, k, v = (piece for part in inputs for piece in part.split(heads * width, -1))
    arguments = (is_causal, dropout, SEED, 7)
    out, sums = gpu_kernels.attend(q, k, v, heads, *arguments)

    leaves = [part.double().requires_grad_() for part in (q, k, v)]
    split = [leaf.unflatten(-1, (heads, width)).transpose(1, 2) for leaf in leaves]
    scores = split[0] @ split[1].mT * width**-0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones(length, keys, device=DEVICE).triu(1).bool(), -torch.inf)
    p = scores.softmax(-1) * attention_masks(length, keys, heads, is_causal, dropout, 7)
    expected = (p @ split[2]).transpose(1, 2).flatten(2)
    check(out, expected, dtype)
    grad = make(2, length, heads * width + 3, dtype=dtype)[..., : heads * width]
    results = [piece for part in gradients for piece in part.split(heads * width, -1)]
    gpu_kernels.attend_backward(grad, (q, k, v), out, sums, results, *arguments)
    for result, gradient in zip(results, torch.autograd.grad(expected, leaves, grad.double()), strict=True):
        check(result, gradient, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=slow), 0.3])
def test_attention_of_packed_rows_is_that_of_each(dropout, dtype):
    """Rows of different lengths, one of them empty, give what rows of one length do, see test_attention_is_torchs."""
    torch.manual_seed(0)
    heads, width, longest = 2, 16, 70
    starts = torch.tensor([0, 70, 75, 75, 108], device=DEVICE)
    joined, grad = make(108, 3 * heads * width, dtype=dtype), make(108, heads * width, dtype=dtype)
    gradient = torch.full_like(joined, torch.nan)
    arguments = (True, dropout, SEED, 7)
    packed = *joined.chunk(3, 1), heads, *arguments, (starts, longest)
    out, sums = gpu_kernels.attend(*packed)
    gpu_kernels.attend_backward(grad, packed[:3], out, sums, gradient.chunk(3, 1), *arguments, (starts, longest))

    padded = torch.zeros(4, longest, 3 * heads * width, device=DEVICE, dtype=dtype)
    grad_padded = torch.zeros_like(padded[..., : heads * width])
    place = [slice(*pair) for pair in itertools.pairwise(starts.tolist())]
    for row, part in enumerate(place):
        length = part.stop - part.start
        padded[row, :length], grad_padded[row, :length] = joined[part], grad[part]
    expected, sums = gpu_kernels.attend(*padded.chunk(3, -1), heads, *arguments)
    gradients = torch.zeros_like(padded)
    each = padded.chunk(3, -1), expected, sums, gradients.chunk(3, -1)
    gpu_kernels.attend_backward(grad_padded, *each, *arguments)
    for row, part in enumerate(place):
        length = part.stop - part.start
        check(out[part], expected[row, :length], dtype)
        check(gradient[part], gradients[row, :length], dtype)


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
    out = gpu_kernels.attend_one(new, *cache, torch.tensor([position], device=DEVICE))
    q, k, v = new[:, 0].double().unsqueeze(2), *seen.double()
    check(out, F.scaled_dot_product_attention(q, k, v).squeeze(2), dtype)
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
    check(gpu_kernels.softmax_nll(logits, targets, -100, False), expected, torch.float32)
    assert torch.equal(logits, before)
    check(gpu_kernels.softmax_nll(logits, targets, -100, True), expected, torch.float32)
    check(logits, gradient, dtype)
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
    assert len(taken) == 9 and all(0 < kib <= 99 for kib in taken.values()), taken


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("target", ["both", "lm", "qformer"])
def test_recorded_passes_are_the_passes(tiny_checkpoint, target):
    """Of two sizes in turn, added up, with dropout: losses and gradients to the last bit."""
    from accelerate.utils import send_to_device

    from captioner.blip2.loading import load_config
    from captioner.fast import compile_kernels
    from captioner.fast.packing import PackedCollator
    from captioner.fast.speed import FastStep, join_weights

    torch.manual_seed(0)
    config, lora = load_config(tiny_checkpoint), (target, 16, 32, 0.3)
    model = compile_kernels.make_small_model(config, lora, DEVICE, torch.bfloat16).train()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    join_weights(model)
    collate, outputs = PackedCollator(config), compile_kernels.make_outputs(model)
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
