"""Each lever of speed.py: with it and without it loss, gradients and adapter agree."""

import inspect
import itertools
import json
import statistics
import weakref
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from conftest import need_triton
from torch.utils.checkpoint import checkpoint
from training_runs import stop_at, train, train_until
from transformers.trainer_callback import CallbackHandler

import main
from captioner.blip2.batches import CaptionCollator, make_dataset
from captioner.blip2.loading import load_model, load_processor
from captioner.blip2.lora import add_lora
from captioner.data.examples import Example
from captioner.data.parallel import one_ahead
from captioner.fast.building import build_kernels
from captioner.fast.caption_loss import caption_nll
from captioner.fast.kernels import choice, head, lora, norm
from captioner.fast.layers import draws_by_kernels, spare_columns, supports
from captioner.fast.linears import list_groups
from captioner.fast.packing import PackedCollator, PackedSampler
from captioner.fast.speed import FastStep, join_weights, unpack_nf4
from captioner.runtime.errors import UserError
from captioner.runtime.files import hash_file
from captioner.training import trainer
from config import TrainConfig, make_config

CPU = torch.device("cpu")
TRAINING_KERNELS = {
    lora: ("_project_low", "_lora_backward", "_add_parts"),
    norm: ("_add_and_norm", "_add_and_norm_backward"),
    head: ("_softmax_nll",),
}


@pytest.fixture(scope="module")
def rows(drawn, tiny_checkpoint):
    """Four rows with captions of different lengths, and the model's configuration."""
    images = sorted((drawn / "images").iterdir())[:4]
    texts = ["There is one car.", "There are 3 cars. There is one truck.", "There is one bus.", "x"]
    examples = [Example(image.name, image, text) for image, text in zip(images, texts, strict=True)]
    processor = load_processor(tiny_checkpoint)
    model = load_model(tiny_checkpoint, False, CPU)
    dataset = make_dataset(examples, processor, 50, model.config.text_config.eos_token_id)
    return [dataset[row] for row in range(4)], model.config


@pytest.fixture(scope="module")
def batch(rows):
    """The rows as the model takes them."""
    return CaptionCollator(rows[1])(rows[0])


@pytest.fixture(scope="module")
def packed(rows):
    """The same for caption_nll."""
    return PackedCollator(rows[1])(rows[0])


def load(checkpoint, load_in_4bit=False, dropout=0.0, rank=4, target="both"):
    """A model with LoRA that has an effect, without dropout anywhere but in LoRA."""
    torch.manual_seed(0)
    model = add_lora(load_model(checkpoint, load_in_4bit, CPU), target, rank, 8, dropout)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model.eval()


def loss_and_gradients(model, compute):
    loss = compute()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return loss.detach(), dict(zip(weights, torch.autograd.grad(loss, weights.values()), strict=True))


def check_agreement(one, other, relative=1e-4):
    assert one[0].item() == pytest.approx(other[0].item(), rel=1e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert gradient.norm() > 0, name
        assert (gradient - other[1][name]).norm() < relative * gradient.norm(), name


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("chunk", [512, 7])
def test_loss_of_text_alone_is_the_models(tiny_checkpoint, batch, packed, monkeypatch, load_in_4bit, chunk):
    monkeypatch.setattr("captioner.fast.caption_loss.CHUNK", chunk)
    model = load(tiny_checkpoint, load_in_4bit)
    assert supports(model)
    tokens = (batch["labels"] != -100).sum()
    plain = loss_and_gradients(model, lambda: model(**batch).loss)
    fast = loss_and_gradients(model, lambda: caption_nll(model, **packed).sum() / tokens)
    check_agreement(plain, fast)


def test_dropout_is_that_of_lora(tiny_checkpoint, rows, monkeypatch):
    """The same masks are drawn, one for layers that read the same input; without LoRA the loss is another."""
    monkeypatch.setattr("captioner.fast.packing.PACKED_TO", 1)
    alike = [row | {"caption_ids": rows[0][0]["caption_ids"]} for row in rows[0]]  # where nothing is padded
    batch, packed = CaptionCollator(rows[1])(alike), PackedCollator(rows[1])(alike)
    model = load(tiny_checkpoint, True, dropout=0.5)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout) and layer.p == 0.5:
            layer.train()
    last = model.get_base_model().language_model.model.decoder.layers[-1]
    for layer in (last.self_attn.out_proj, last.fc1, last.fc2):  # whose masks are of the predicting places alone
        layer.lora_dropout.eval()
    for group in list_groups(model):
        if group[0].lora_dropout["default"].training:
            group[0].lora_dropout["default"].forward = DropAlike(len(group))
            for layer in group[1:]:
                layer.lora_dropout = group[0].lora_dropout
    tokens = (batch["labels"] != -100).sum()
    inputs = batch | {name: batch[name][:, :-1] for name in ("input_ids", "attention_mask")}
    targets = inputs.pop("labels")[:, 1:]  # what is read last is the last token but one

    def compute_by_model():
        torch.manual_seed(1)
        return F.cross_entropy(model(**inputs).logits.flatten(0, 1), targets.flatten())

    plain = loss_and_gradients(model, compute_by_model)
    torch.manual_seed(1)
    fast = loss_and_gradients(model, lambda: caption_nll(model, **packed).sum() / tokens)
    check_agreement(plain, fast)
    with model.disable_adapter():
        base = caption_nll(model, **packed).sum() / tokens
        assert base.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    assert abs(base - fast[0]) > 1e-3


class DropAlike:
    """Dropout that draws one mask for so many calls."""

    def __init__(self, calls: int):
        self.calls, self.masks = calls, []

    def __call__(self, x):
        if not self.masks:
            self.masks = [F.dropout(torch.ones_like(x), 0.5)] * self.calls
        return x * self.masks.pop()


@pytest.fixture
def kernels(monkeypatch):
    """The Triton kernels in use on the CPU, in Triton's interpreter."""
    need_triton()
    monkeypatch.setattr(choice, "use_kernels", lambda x: True)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "joined"), [(16, False), (16, True), (8, True), (24, True)])
def test_kernels_give_the_models_loss(tiny_checkpoint, batch, packed, kernels, rank, joined):
    """Of any rank."""
    model = load(tiny_checkpoint, rank=rank)
    tokens = (batch["labels"] != -100).sum()
    plain = loss_and_gradients(model, lambda: model(**batch).loss)
    if joined:
        join_weights(model)
        layer = model.get_base_model().language_model.model.decoder.layers[0]
        assert spare_columns(layer.fc1.base_layer.weight) == rank
        assert spare_columns(layer.self_attn.v_proj.base_layer.weight) == 3 * rank
    check_agreement(plain, loss_and_gradients(model, lambda: caption_nll(model, **packed).sum() / tokens))


class Watched:
    """A kernel whose launches are noted: its name, and what of the arguments a kernel is built anew for."""

    def __init__(self, kernel, forms: set):
        self.kernel, self.forms = kernel, forms

    def __getitem__(self, grid):
        def launch(*args, **options):
            values = dict(zip(inspect.signature(self.kernel.fn).parameters, args, strict=False))
            whole = {name: value % 16 == 0 for name, value in values.items() if isinstance(value, int)}
            kinds = {name: value.dtype for name, value in values.items() if torch.is_tensor(value)} | whole
            kinds = {name: kind for name, kind in kinds.items() if name not in choice.VARYING}
            self.forms.add((self.kernel.__name__, *sorted(kinds.items()), *sorted(options.items())))
            self.kernel[grid](*args, **options)

        return launch


@pytest.mark.slow
@pytest.mark.parametrize("rank", [16, 48])
def test_kernels_built_ahead_are_those_of_training(tiny_checkpoint, packed, kernels, monkeypatch, rank):
    model, forms = load(tiny_checkpoint, dropout=0.1, rank=rank).train(), set()
    for module, names in TRAINING_KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Watched(getattr(module, name), forms))
    join_weights(model)
    caption_nll(model, **packed).sum().backward()
    needed, state = set(forms), torch.get_rng_state()
    forms.clear()
    build_kernels(model, rank)
    assert forms == needed and {name for name, *_ in needed} == {*itertools.chain(*TRAINING_KERNELS.values())}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_gradients_of_kernels_are_those_of_their_dropout(tiny_checkpoint, rows, kernels):
    """With the masks of one seed, the loss changes along a direction as the gradient says."""
    model = load(tiny_checkpoint, dropout=0.3, rank=16).train()
    packed = PackedCollator(rows[1])(rows[0][1:3])
    join_weights(model)
    model.get_base_model().qformer.dropout.eval()  # drawn by torch

    def compute():
        torch.manual_seed(1)
        return caption_nll(model, **packed).sum()

    loss, gradients = loss_and_gradients(model, compute)
    assert compute() == loss
    others = [caption_nll(model, **packed).sum() - loss for _ in range(4)]  # of other seeds
    assert len(set(others)) == 4 and max(map(abs, others)) > 1e-3, others
    for part in ("qformer", "language_model"):
        weights = {name: weight for name, weight in model.named_parameters() if name in gradients and part in name}
        slope = sum((gradients[name] ** 2).sum() for name in weights).sqrt()
        losses = []
        for step in (-1e-3, 1e-3):
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.add_(step * gradients[name] / slope)
                losses.append(compute().double())
                for name, weight in weights.items():
                    weight.sub_(step * gradients[name] / slope)
        assert ((losses[1] - losses[0]) / 2e-3).item() == pytest.approx(slope.item(), rel=0.02)


def checkpoint_activations(model) -> None:
    """By the name that the installed transformers has for it."""
    known = hasattr(model, "activation_checkpointing_enable")
    (model.activation_checkpointing_enable if known else model.gradient_checkpointing_enable)({"use_reentrant": False})


def test_gradient_checkpointing_changes_nothing(tiny_checkpoint, packed):
    model = load(tiny_checkpoint)
    kept = loss_and_gradients(model, lambda: caption_nll(model, **packed).sum())
    checkpoint_activations(model)
    for layer in model.modules():  # training mode, but for the dropouts
        layer.training = not isinstance(layer, torch.nn.Dropout)
        layer.dropout = 0.0 if isinstance(getattr(layer, "dropout", None), float) else getattr(layer, "dropout", None)
    check_agreement(kept, loss_and_gradients(model, lambda: caption_nll(model, **packed).sum()), relative=1e-6)


@pytest.mark.parametrize("by_kernels", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dropouts_are_the_same_when_activations_are_computed_again(tiny_checkpoint, rows, monkeypatch, by_kernels):
    """Also where they are drawn by kernels, which need no state of torch's generator: such a pass can be recorded."""
    need_triton()
    monkeypatch.setattr(choice, "use_kernels", lambda x: by_kernels)
    model, states = load(tiny_checkpoint, dropout=0.3, rank=16).train(), []
    packed = PackedCollator(rows[1])(rows[0][2:])

    def note(*args, preserve_rng_state, **options):
        states.append(preserve_rng_state)
        return checkpoint(*args, preserve_rng_state=preserve_rng_state, **options)

    def run():
        torch.manual_seed(3)
        return loss_and_gradients(model, lambda: caption_nll(model, **packed).sum())

    monkeypatch.setattr("captioner.fast.layers.checkpoint", note)
    kept = run()
    assert not states
    checkpoint_activations(model)
    check_agreement(kept, run(), relative=1e-6)
    assert set(states) == {not by_kernels}
    assert abs(kept[0] - loss_and_gradients(model.eval(), lambda: caption_nll(model, **packed).sum())[0]) > 1e-3


def test_unpacked_weights_have_the_same_values(tiny_checkpoint, packed):
    model = load(tiny_checkpoint, True)
    nf4 = loss_and_gradients(model, lambda: caption_nll(model, **packed).sum())
    assert unpack_nf4(model) > 10
    assert not any(isinstance(layer, bnb.nn.Linear4bit) for layer in model.modules())
    join_weights(model)
    layer = model.get_base_model().language_model.model.decoder.layers[0].self_attn
    query, key = layer.q_proj.base_layer, layer.k_proj.base_layer
    assert key.weight.data_ptr() == query.weight.data_ptr() + query.weight.nbytes
    unpacked = loss_and_gradients(model, lambda: caption_nll(model, **packed).sum())
    check_agreement(nf4, unpacked, relative=1e-5)
    unquantised = load(tiny_checkpoint, False)
    assert abs(caption_nll(unquantised, **packed).sum() - nf4[0]) > 1e-3  # NF4 it still is


def test_all_dropouts_come_from_the_seed_but_attentions(kernels):
    assert draws_by_kernels(torch.zeros(1), 0.0) and not draws_by_kernels(torch.zeros(1), 0.1)


def test_room_beside_a_matrix_is_counted_in_values():
    assert spare_columns(torch.zeros(3, 8)[:, :5]) == 3 and spare_columns(torch.zeros(3, 8)) == 0


def test_only_what_reads_one_input_or_has_lora_is_joined(tiny_checkpoint):
    """With LoRA on the Q-Former alone, OPT's query, key and value are joined, and no layer by itself."""
    model = load(tiny_checkpoint, target="qformer")
    join_weights(model)
    layer = model.get_base_model().language_model.model.decoder.layers[0]
    assert layer.self_attn.q_proj.joined[0].shape[0] == 3 * layer.self_attn.q_proj.out_features
    assert not any(hasattr(linear, "joined") for linear in (layer.self_attn.out_proj, layer.fc1, layer.fc2))


def test_positions_of_a_packed_batch_are_a_fast_size(rows):
    [row, *_], config = rows
    for length in (*range(1, 70), *range(1000, 1070)):
        [_, end, size] = PackedCollator(config)([row | {"caption_ids": [5] * length}])["starts"].tolist()
        assert end == config.num_query_tokens + length
        assert size % 32 == 16 and 0 <= size - end < 32


@pytest.mark.parametrize("target", ["both", "lm", "qformer"])
def test_passes_add_up_to_a_step(tiny_checkpoint, rows, packed, target):
    """The gradients times a scale, which fp16 needs, and the loss without it."""
    model, collate = load(tiny_checkpoint, target=target), PackedCollator(rows[1])
    tokens = (packed["labels"] != -100).sum()
    _, whole = loss_and_gradients(model, lambda: caption_nll(model, **packed).sum() / tokens)
    step = FastStep(model, cuda_graphs=False)
    for _ in range(2):  # a second step begins anew
        step.zero_grad()
        loss = sum(step(collate(rows[0][i : i + 2]), tokens, 4.0) for i in (0, 2))
    assert loss.item() == pytest.approx((caption_nll(model, **packed).sum() / tokens).item(), rel=1e-6)
    expected = {id(weight): whole[name] for name, weight in model.named_parameters() if name in whole}
    parts = step.whole.grad.split([weight.numel() for weight in step.weights])
    for weight, part in zip(step.weights, parts, strict=True):
        gradient = expected.pop(id(weight))
        assert (part.view_as(gradient) / 4 - gradient).norm() < 1e-4 * gradient.norm()
    assert not expected


def test_half_precision_with_a_scale_is_full_precision(tiny_checkpoint, packed):
    """To rounding, as on a T4: OPT and its LoRA compute in fp16, the Q-Former in fp32."""
    model = load(tiny_checkpoint)
    loss, expected = loss_and_gradients(model, lambda: caption_nll(model, **packed).sum() / 50)
    blip = model.get_base_model()
    for part in (blip.vision_model, blip.language_model, blip.language_projection):
        part.half()
    for name, weight in model.named_parameters():
        weight.data = weight.data.float() if "lora_" in name else weight.data
    step = FastStep(model, cuda_graphs=False)
    half = step(packed | {"pixel_values": packed["pixel_values"].half()}, 50, 1024.0)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(loss.item(), rel=1e-3)
    names = {id(weight): name for name, weight in model.named_parameters()}
    parts = step.whole.grad.split([weight.numel() for weight in step.weights])
    for weight, part in zip(step.weights, parts, strict=True):
        gradient = expected[names[id(weight)]].flatten()
        assert (part / 1024 - gradient).norm() < 0.05 * gradient.norm(), names[id(weight)]


def test_a_gradient_beyond_fp16_leaves_the_step_out(tiny_checkpoint, packed):
    """The scaler sees it in the whole, and takes a smaller scale."""
    step = FastStep(load(tiny_checkpoint), cuda_graphs=False)
    optimizer, scaler = torch.optim.AdamW([step.whole], fused=True), torch.amp.GradScaler("cpu", init_scale=64.0)
    step(packed, 50)
    unscaled = step.whole.grad.clone()
    for gradient, is_left_out in ((None, False), (torch.inf, True)):
        before = step.whole.detach().clone()
        step.zero_grad()
        step(packed, 50, scaler.scale(torch.ones(())))
        if gradient is not None:
            step.whole.grad[7] = gradient
        scaler.unscale_(optimizer)
        if gradient is None:
            assert torch.allclose(step.whole.grad, unscaled, rtol=1e-4, atol=1e-7)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(step.whole, before) is is_left_out
    assert scaler.get_scale() == 32.0


def test_weights_that_leave_the_whole_are_noticed(tiny_checkpoint, packed):
    """Else training would go on, and save what the weights were when they left."""
    step = FastStep(load(tiny_checkpoint), cuda_graphs=False)
    step(packed, 50)
    for weight in step.weights:
        weight.data = weight.data.clone()
    with pytest.raises(AssertionError, match="moved out of the whole"):
        step(packed, 50)


def test_a_step_of_the_whole_is_that_of_its_weights(tiny_checkpoint, packed):
    """Bit for bit; AdamW knows each weight or the whole alone."""
    results = []
    for is_joined in (False, True):
        model = load(tiny_checkpoint)
        step = FastStep(model, cuda_graphs=False)
        optimizer = torch.optim.AdamW([step.whole] if is_joined else step.weights, lr=1e-2, fused=True)
        for _ in range(3):
            step.zero_grad()
            step(packed, 50)
            parts = step.whole.grad.split([weight.numel() for weight in step.weights])
            for weight, part in zip(step.weights, parts, strict=True):
                weight.grad = part.view_as(weight)
            optimizer.step()
        results.append(torch.cat([weight.detach().flatten() for weight in step.weights]))
        assert torch.equal(results[-1], step.whole)
    assert torch.equal(*results)


def test_another_adapter_leaves_the_joined_one_alone(tiny_checkpoint, packed):
    model = load(tiny_checkpoint)
    step = FastStep(model, cuda_graphs=False)
    before = step.whole.detach().clone()
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    loss = caption_nll(model, **packed).sum()
    assert torch.equal(step.whole, before)
    model.set_adapter("default")
    assert abs(caption_nll(model, **packed).sum() - loss) > 1e-3


def test_packed_batches_have_about_one_size():
    """And their halves and quarters, which are passes and the shares of several GPUs."""
    lengths = [40 + (7 * n % 101) ** 2 // 100 for n in range(1000)]
    sampler = PackedSampler(lengths, batch_size=16, window=100, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(1000)) and list(sampler) == order
    for size in (16, 8, 4):
        dealt, drawn = (
            statistics.stdev(sum(lengths[row] for row in rows[first : first + size]) for first in range(0, 992, size))
            for rows in (order, torch.randperm(1000).tolist())
        )
        assert dealt < (0.25 if size == 16 else 0.4) * drawn, size
    sampler.set_epoch(1)
    assert list(sampler) != order and sorted(sampler) == list(range(1000))
    pairs = [set(), set()]  # of rows that are in one step, of an epoch in one window
    small = PackedSampler(lengths[:160], batch_size=16, window=100, seed=3)
    for epoch in (0, 1):
        small.set_epoch(epoch)
        for step in zip(*[iter(small)] * 16, strict=True):
            pairs[epoch] |= set(itertools.combinations(sorted(step), 2))
    assert len(pairs[0] & pairs[1]) < 2 * len(pairs[0]) ** 2 / (160 * 159 / 2)  # by chance: half of it
    assert list(PackedSampler([3, 1, 2], batch_size=16, window=10, seed=3)) != [0, 1, 2]


@pytest.fixture(scope="module", params=["off", "on"])
def passes(request, tmp_path_factory, settings):
    """All modules' modes in each pass of a run, and in each of its validation's, with and without the fast step."""
    modes, real = [], trainer.CaptionTrainer.training_step
    validated, on_prediction_step = [], CallbackHandler.on_prediction_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = real(self, model, inputs, num_items_in_batch)
        modes.append({module.training for module in model.modules()})
        return loss

    def note_validation(self, *args):
        validated.append({module.training for module in self.model.modules()})
        return on_prediction_step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("passes"))
        patch.setattr(trainer.CaptionTrainer, "training_step", training_step)
        patch.setattr(CallbackHandler, "on_prediction_step", note_validation)
        train(settings, fast=request.param)
    return modes, validated


def test_all_modules_train_in_every_step(passes):
    """From the first step on, and after validation: OPT's own dropout, and gradient checkpointing, depend on it."""
    modes, _ = passes
    assert modes == [{True}] * 12  # passes of 6 steps


def test_no_module_trains_in_validation(passes):
    """Where dropout would add noise to the loss."""
    _, validated = passes
    assert validated and set(map(frozenset, validated)) == {frozenset({False})}


def test_fast_run_is_the_plain_run(folder, settings):
    """Through main.py: the same losses to rounding."""
    losses = {}
    for name, changes in {"plain": {}, "fast": {"fast": "on"}}.items():
        changes |= {"run_name": name, "output": Path(name), "lora_dropout": 0.0, "length_window": 0}  # of one order
        main.main(make_config(TrainConfig, **settings | changes))
        records = [json.loads(line) for line in Path(f"logs/{name}/metrics.jsonl").read_text().splitlines()]
        losses[name] = [r[key] for r in records for key in ("loss", "eval_loss", "grad_norm") if key in r]
    assert losses["fast"] == pytest.approx(losses["plain"], rel=1e-3)


@pytest.mark.slow
def test_a_stopped_fast_run_goes_on_to_the_same_adapter(folder, settings):
    """Bit for bit, without a flag that says so."""
    expected = train(settings, fast="on")
    halves = make_config(TrainConfig, **settings | {"fast": "on", "output": Path("halves")})
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(SystemExit):
            main.main(halves)
    main.main(halves)
    assert hash_file(Path("halves/adapter_model.safetensors")) == expected


def test_batches_and_kernels_are_made_ahead(folder, settings, monkeypatch):
    """By threads, also where a run goes on in the midst of an epoch; no batch stays when training has ended."""
    built, epochs, save, features = [], [], main.save_run, {"fast": "on", "features": Path("features")}

    def note_epoch(batches):
        ahead = one_ahead(batches)
        epochs.append(weakref.ref(ahead))
        return ahead

    def save_run(*args):
        assert all(epoch() is None for epoch in epochs)
        save(*args)

    monkeypatch.setattr("captioner.fast.door.build_kernels", lambda model, rank: built.append(rank))
    monkeypatch.setattr("captioner.fast.trainer.one_ahead", note_epoch)
    monkeypatch.setattr(main, "save_run", save_run)
    expected = train(settings, **features)
    assert built == [16] and len(epochs) == 2
    train_until(settings, 2, **features, output=Path("halves"))
    main.main(make_config(TrainConfig, **settings | features | {"output": Path("halves")}))
    assert hash_file(Path("halves/adapter_model.safetensors")) == expected and len(epochs) == 5


def test_a_run_does_not_go_on_in_another_way(folder, settings):
    """With --fast auto, on a machine where that is another: the order of frames and the optimiser's state differ."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 4)
        train(settings)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="way training: was plain, is fast"):
        patch.setattr("captioner.fast.door.find_obstacle", lambda *_: None)
        train(settings)


def test_recorded_passes_go_when_memory_is_short(folder, settings, monkeypatch):
    """They are of the size that did not fit, and the model lives on."""
    steps, real = [], FastStep.__call__

    def fail_once(self, batch, *args):
        if all(self is not step() for step in steps):
            steps.append(weakref.ref(self))
        if len(batch["starts"]) > 3:  # more than one row
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        assert steps[0]() is None, "the first Trainer's passes are still there"
        return real(self, batch, *args)

    monkeypatch.setattr(FastStep, "__call__", fail_once)
    train(settings, fast="on", num_train_epochs=1)
    assert len(steps) == 2
