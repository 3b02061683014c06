"""Fast generation against transformers' own, on a tiny BLIP-2 with random weights; without a GPU's graphs."""

import contextlib

import pytest
import torch
from conftest import need_triton
from transformers import Blip2ForConditionalGeneration, TopPLogitsWarper

from benchmarks.full_size import build_full_size_config
from captioner.blip2 import batches, lora, sampling
from captioner.blip2 import generation as plain_generation
from captioner.blip2 import loading as blip2
from captioner.blip2.lora import get_blip2
from captioner.blip2.sampling import DrawTokens, seed_image
from captioner.fast import captioning as fast_captioning
from captioner.fast import generation
from captioner.fast.adapters import copy_lora
from captioner.fast.captioning import FastCaptioner, FastGreedyCaptioner, max_batch, pick_batch_size
from captioner.fast.generation import FastGenerator
from captioner.fast.kernels import choice
from captioner.fast.layers import embed_images, supports
from captioner.fast.speed import FastStep, join_weights, merge_lora, unpack_nf4
from captioner.runtime.errors import UserError
from config import EvalConfig, make_config

CPU = torch.device("cpu")
NEW_TOKENS = 60  # positions 9 to 68: five buckets of 16


def load(checkpoint, load_in_4bit=False, with_lora=False, rank=4):
    """A model whose captions differ by image; `with_lora` adds matrices that change them."""
    torch.manual_seed(0)
    model = blip2.load_model(checkpoint, load_in_4bit, CPU)
    if with_lora:
        model = lora.add_lora(model, "both", rank=rank, alpha=8, dropout=0.0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
    return model.eval()


def make_pixels(rows: int):
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def generate_slowly(model, pixels, new_tokens=NEW_TOKENS):
    """What transformers' generate() gives: (B, N) new tokens, greedy."""
    prefix = torch.tensor([batches.prefix_ids(model.config)]).expand(len(pixels), -1)
    settings = plain_generation.make_generation_config(model.config, new_tokens)
    tokens = model.generate(
        pixel_values=pixels,
        input_ids=prefix,
        attention_mask=torch.ones_like(prefix),
        generation_config=settings,
        do_sample=False,
    )
    return tokens[:, prefix.shape[1] :]


def end_early(model, tokens):
    """Make the end token one that many rows of `tokens` (B, N) reach, each at its own step; returns those steps."""
    first = {  # {token: where it comes first in each row}
        token: [row.index(token) if token in row else NEW_TOKENS for row in tokens.tolist()]
        for token in tokens.unique().tolist()
    }
    text = model.config.text_config
    end = max(set(first) - {text.pad_token_id}, key=lambda token: len(set(first[token])))
    text.eos_token_id = end
    return first[end]


@pytest.mark.parametrize(("load_in_4bit", "with_lora"), [(False, False), (False, True), (True, False), (True, True)])
def test_greedy_equals_transformers(tiny_checkpoint, load_in_4bit, with_lora):
    model, pixels = load(tiny_checkpoint, load_in_4bit, with_lora), make_pixels(16)
    assert supports(model)
    ends = end_early(model, generate_slowly(model, pixels))
    assert len(set(ends)) > 4, ends
    generator = FastGenerator(model, 16, NEW_TOKENS, bucket=16)
    assert torch.equal(generator.generate(pixels), generate_slowly(model, pixels))
    assert torch.equal(generator.generate(pixels[:3]), generate_slowly(model, pixels[:3]))
    longer = FastGenerator(model, 16, 100, bucket=16).generate(pixels[:1])
    assert torch.equal(longer, generate_slowly(model, pixels[:1], 100))
    expected = generate_slowly(model, pixels)
    assert merge_lora(model) == (with_lora and not load_in_4bit)
    assert (unpack_nf4(model) > 0) == load_in_4bit
    join_weights(model)  # as where there is room
    joined = FastGenerator(model, 16, NEW_TOKENS, bucket=16)
    assert torch.equal(joined.generate(pixels), expected)


def test_merged_weights_give_the_same_captions(tiny_checkpoint):
    """Also those that were NF4, whose own merge() would quantise them anew."""
    model, pixels = load(tiny_checkpoint, True, True), make_pixels(16)
    expected = generate_slowly(model, pixels)
    assert not merge_lora(model)
    unpack_nf4(model)
    assert merge_lora(model)
    generator = FastGenerator(model, 16, NEW_TOKENS)
    assert torch.equal(generator.generate(pixels), expected)
    assert not generator.lora.matrices


def note_steps(monkeypatch) -> list[tuple[int, int]]:
    """A list that (rows, positions of the cache) of each step go into."""
    steps, step = [], FastGenerator._step

    def note(self, size, length, choice):
        steps.append((size, length))
        step(self, size, length, choice)

    monkeypatch.setattr(FastGenerator, "_step", note)
    return steps


def test_finished_rows_leave_the_batch(tiny_checkpoint, monkeypatch):
    model, pixels = load(tiny_checkpoint), make_pixels(16)
    end_early(model, generate_slowly(model, pixels))
    steps = note_steps(monkeypatch)
    tokens = FastGenerator(model, 16, NEW_TOKENS, bucket=16).generate(pixels)
    assert torch.equal(tokens, generate_slowly(model, pixels))
    assert steps[0] == (16, 16)
    assert len({length for _, length in steps}) > 2
    assert steps == sorted(steps, key=lambda entry: (-entry[0], entry[1]))  # rows only leave, the cache only grows
    assert steps[-1][0] < 16, steps


def test_nothing_is_read_that_an_earlier_call_left(tiny_checkpoint):
    model, pixels = load(tiny_checkpoint), make_pixels(3)
    generator = FastGenerator(model, 8, 20)
    tokens = generator.generate(pixels)
    with torch.inference_mode():
        generator.state.cache.fill_(torch.nan)
    assert torch.equal(generator.generate(pixels), tokens)


def test_steps_end_soon_after_the_last_caption(tiny_checkpoint):
    model, pixels = load(tiny_checkpoint), make_pixels(1)
    row = generate_slowly(model, pixels)[0].tolist()
    model.config.text_config.eos_token_id = row[4]
    generator = FastGenerator(model, 4, NEW_TOKENS)
    assert generator.generate(pixels).tolist() == [row[: row.index(row[4]) + 1]]
    assert generator.state.position.item() - generator.prefix <= generation.CHECK_EVERY


@pytest.mark.parametrize("joined", [True, False])
def test_adapter_switched_off_and_trained_between_calls(tiny_checkpoint, joined):
    model, pixels = load(tiny_checkpoint, True, True), make_pixels(4)
    if joined:  # LoRA's weights as parts of one tensor
        FastStep(model, cuda_graphs=False)
    generator = FastGenerator(model, 4, 20)
    with_adapter = generator.generate(pixels)
    with model.disable_adapter():
        without = generator.generate(pixels)
        assert torch.equal(without, generate_slowly(model, pixels, 20))
    assert not torch.equal(with_adapter, without)
    assert torch.equal(generator.generate(pixels), with_adapter)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(-1)
    trained = generator.generate(pixels)
    assert torch.equal(trained, generate_slowly(model, pixels, 20))
    assert not torch.equal(trained, with_adapter)


CHOICE = (0.9, 0.8)  # temperature and top_p
SEEDS = list(range(100, 116))


def test_seed_alone_decides_what_is_drawn(tiny_checkpoint, monkeypatch):
    """Not the calls before, nor which rows left the batch."""
    model, pixels = load(tiny_checkpoint, with_lora=True), make_pixels(16)
    end_early(model, FastGenerator(model, 16, NEW_TOKENS).generate(pixels, CHOICE, SEEDS))
    generator, steps = FastGenerator(model, 16, NEW_TOKENS, bucket=16), note_steps(monkeypatch)
    first = generator.generate(pixels, CHOICE, SEEDS)
    assert steps[-1][0] < 16, steps
    assert not torch.equal(generator.generate(pixels, CHOICE, SEEDS[::-1]), first)
    generator.generate(pixels[:3])
    assert torch.equal(generator.generate(pixels, CHOICE, SEEDS), first)
    other = FastGenerator(model, 16, NEW_TOKENS, bucket=128)
    assert torch.equal(other.generate(pixels, CHOICE, SEEDS), first)


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_what_is_drawn_for_an_image_depends_on_no_other(tiny_checkpoint, load_in_4bit):
    """On neither the batch that it is in nor its place there; and transformers' generate() draws the same."""
    model, pixels = load(tiny_checkpoint, load_in_4bit, with_lora=True), make_pixels(16)
    together = FastGenerator(model, 16, NEW_TOKENS).generate(pixels, CHOICE, SEEDS)
    assert len(together.unique(dim=0)) == 16
    small = FastGenerator(model, 5, NEW_TOKENS)
    for rows in ([3], [15, 0, 7], [4, 5, 6, 7, 8]):
        seeds = [SEEDS[row] for row in rows]
        assert torch.equal(small.generate(pixels[rows], CHOICE, seeds), together[rows])
    settings = plain_generation.make_generation_config(model.config, NEW_TOKENS)
    draw = DrawTokens(*CHOICE, SEEDS, CPU)
    assert torch.equal(plain_generation.generate_tokens(model, pixels, settings, draw), together)


def test_more_tokens_than_the_model_has_positions_are_refused(tiny_checkpoint):
    with pytest.raises(AssertionError, match=r"100000 new tokens, but OPT has \d+ positions"):
        FastGenerator(load(tiny_checkpoint), 3, 100_000)


def test_the_whole_vocabulary_is_drawn_from_without_a_nucleus(tiny_checkpoint, monkeypatch):
    """With top-p 1, however few tokens a nucleus may have: these two are the likeliest, and others are drawn too."""
    monkeypatch.setattr(sampling, "NUCLEUS", 2)
    generator, pixels = FastGenerator(load(tiny_checkpoint), 3, 1), make_pixels(3)

    def draw(top_p: float) -> set[int]:
        drawn = [generator.generate(pixels, (1.0, top_p), range(seed, seed + 3)) for seed in range(8)]
        return set(torch.cat(drawn).flatten().tolist())

    assert len(draw(0.999)) <= 2 * 3 < len(draw(1.0))  # of three images


def test_tiny_nucleus_is_greedy(tiny_checkpoint):
    model, pixels = load(tiny_checkpoint), make_pixels(3)
    generator = FastGenerator(model, 3, 30)
    drawn = generator.generate(pixels, (1.0, 1e-6), SEEDS[:3])
    assert torch.equal(drawn, generator.generate(pixels))


@pytest.mark.parametrize("top_p", [0.6, 1.0])
def test_first_token_has_the_distribution_of_transformers(tiny_checkpoint, top_p):
    model, rows, temperature = load(tiny_checkpoint), 4096, 0.7
    pixels = make_pixels(1)
    prefix = torch.tensor([batches.prefix_ids(model.config)])
    with torch.no_grad():
        logits = model(pixel_values=pixels, input_ids=prefix).logits[:, -1] / temperature
    expected = (TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits).softmax(-1)[0]  # (V,)
    generator = FastGenerator(model, rows, 1)
    seeds = [seed_image(0, f"{row}.jpg") for row in range(rows)]
    drawn = generator.generate(pixels.expand(rows, -1, -1, -1), (temperature, top_p), seeds)
    counts = torch.bincount(drawn[:, 0], minlength=len(expected))
    assert expected.count_nonzero() > 5
    assert (counts[expected == 0] == 0).all()
    deviation = (expected * (1 - expected) * rows).sqrt()
    assert ((counts - rows * expected).abs() <= 5 * deviation + 1).all()


def test_kernels_give_the_same_captions(tiny_checkpoint, monkeypatch):
    """In Triton's interpreter: attention of one token is taken, and LoRA's products lie beside the weights'."""
    need_triton()
    model, pixels = load(tiny_checkpoint, with_lora=True, rank=8), make_pixels(3)
    expected = FastGenerator(model, 3, 12).generate(pixels)
    calls, attend_one = [], generation.attend_one
    monkeypatch.setattr(choice, "use_kernels", lambda x: True)
    monkeypatch.setattr(generation, "attend_one", lambda *args: calls.append(args) or attend_one(*args))
    join_weights(model)
    assert torch.equal(FastGenerator(model, 3, 12).generate(pixels), expected)
    assert calls and len(expected.unique(dim=0)) > 1


def test_graphs_are_captured_once_and_replayed(tiny_checkpoint, monkeypatch):
    """With stand-ins for CUDA's: capturing notes a step and runs nothing, replaying runs what was noted."""
    model, pixels = load(tiny_checkpoint), make_pixels(8)
    captured, replayed = [], []
    step = FastGenerator._step

    class Graph:
        def replay(self):
            replayed.append(self.arguments)
            step(generator, *self.arguments)

    @contextlib.contextmanager
    def capture(graph, pool, capture_error_mode):
        def note(self, *arguments):
            graph.arguments = arguments
            captured.append(arguments)

        with monkeypatch.context() as patch:
            patch.setattr(FastGenerator, "_step", note)
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    generator = FastGenerator(model, 8, 30, bucket=16)
    generator.use_graphs = True
    expected = generate_slowly(model, pixels, 30)  # 29 steps, over three lengths of the cache
    assert torch.equal(generator.generate(pixels), expected)
    assert captured == [(8, 16, None), (8, 32, None), (8, 48, None)]
    assert len(replayed) == 29 - 3
    assert torch.equal(generator.generate(pixels), expected)
    assert len(captured) == 3
    assert len(replayed) == 29 - 3 + 29


def test_other_models_are_not_supported(tiny_checkpoint):
    model = load(tiny_checkpoint)
    model.config.text_config.do_layer_norm_before = False
    assert not supports(model)
    model = load(tiny_checkpoint, with_lora=True)
    assert supports(model)
    attention = model.get_base_model().language_model.model.decoder.layers[0].self_attn
    attention.q_proj.lora_variant["default"] = object()  # DoRA, say
    assert not supports(model)
    assert not supports(torch.nn.Linear(2, 2))


def test_a_variant_of_lora_in_the_qformer_is_not_supported(tiny_checkpoint):
    model = load(tiny_checkpoint, with_lora=True)
    layer = model.get_base_model().qformer.encoder.layer[0]
    layer.attention.attention.key.lora_variant["default"] = object()
    assert not supports(model)


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_image_tokens_in_half_precision(tiny_checkpoint, monkeypatch, load_in_4bit):
    """As on a GPU without bf16: the Q-Former stays in fp32, the rest is fp16; LoRA follows each."""
    monkeypatch.setattr("captioner.blip2.loading.pick_dtype", lambda device: torch.float16)
    model = load(tiny_checkpoint, load_in_4bit, with_lora=True)
    blip, pixels = get_blip2(model), make_pixels(2).half()
    assert blip.qformer.layernorm.weight.dtype == torch.float32
    with torch.inference_mode():
        vision = blip.vision_model(pixel_values=pixels).last_hidden_state
        image = embed_images(blip, vision, copy_lora(blip))
        expected = blip.get_image_features(pixels, return_dict=True).pooler_output
    assert image.dtype == torch.float16
    assert (image - expected).abs().max() < 0.01 * expected.abs().max()


@pytest.mark.parametrize(
    ("room", "batch_size", "chosen"),
    [
        (600, None, 512),
        (600, 8, 8),
        (100, None, 94),
        (6, None, 6),
        (6, 6, 6),
        (4, 8, None),
        (0, None, None),
        (0, 8, None),
    ],
)
def test_way_to_generate_is_chosen_by_room(tiny_checkpoint, room, batch_size, chosen, capsys):
    captioner, model = FastCaptioner.__new__(FastCaptioner), load(tiny_checkpoint)  # without loading
    captioner.model, captioner.generator = model, None
    captioner.generation = plain_generation.make_generation_config(model.config, 8)
    for fast in ("on", "auto"):
        captioner.config = make_config(EvalConfig, fast=fast, batch_size=batch_size)
        if chosen is not None:
            captioner._make_generator(room, 1024)
            assert captioner.batch_size == captioner.generator.batch_size == chosen
        elif fast == "on":
            with pytest.raises(UserError, match=f"room for {room} images"):
                captioner._make_generator(room, 1024)
        else:
            captioner._make_generator(room, 1024)
            assert captioner.generator is None
            assert f"from transformers' generate(): there is room for {room} images" in capsys.readouterr().out


@pytest.mark.parametrize(("room", "way"), [(8, "FastGenerator"), (0, "generate")])
@pytest.mark.parametrize("model_floors", [False, True])
def test_scores_say_whether_weights_were_merged(tiny_checkpoint, monkeypatch, room, way, model_floors):
    """Also where there is room for no batch, and transformers' generate() captions with them."""
    monkeypatch.setattr(fast_captioning, "measure_room", lambda *args: room)
    captioner, model = FastCaptioner.__new__(FastCaptioner), load(tiny_checkpoint, with_lora=True)  # without loading
    captioner.config, captioner.model = make_config(EvalConfig, model_floors=model_floors), model
    captioner.generator = None
    captioner.generation = plain_generation.make_generation_config(model.config, 8)
    captioner._make_generator(captioner._make_room(False), 8)
    assert captioner.way == way + "-merged" * (not model_floors)


@pytest.mark.parametrize(
    ("room", "images", "most", "size"),
    [
        (600, 16, 512, 16),
        (600, 1200, 512, 400),
        (100, 16, 16, 16),
        (100, 1200, 16, 16),
        (8, 16, 512, 8),
        (95, 720, 512, 60),
        (127, 720, 512, 90),
        (1, 16, 512, 1),
        (0, 16, 512, 0),
    ],
)
def test_batches_fill_the_room_evenly(room, images, most, size):
    assert pick_batch_size(room, images, most) == size


@pytest.mark.parametrize("room", [600, 8, 0])
def test_validation_asks_for_memory_once_and_gives_it_back(tiny_checkpoint, monkeypatch, room):
    """Where it is not ample; and more images than the generator takes at once are captioned in parts."""
    asked = []
    monkeypatch.setattr(fast_captioning, "measure_room", lambda *_: asked.append(True) or room)
    model, pixels = load(tiny_checkpoint), make_pixels(16)
    settings = plain_generation.make_generation_config(model.config, 12)
    processor = blip2.load_processor(tiny_checkpoint)
    expected = plain_generation.GreedyCaptioner(processor, settings)(model, pixels)
    caption = FastGreedyCaptioner(processor, settings, 16)
    for _ in range(2):
        caption.prepare(model)
        assert caption(model, pixels[:10]) + caption(model, pixels[10:]) == expected
        assert (caption.generator is None) == (room == 0)
        caption.finish()
    assert (caption.generator is None) == (room != 600)
    assert len(asked) == (1 if room == 600 else 2)


def test_max_batch_fills_the_memory(tiny_checkpoint):
    """Full size in bf16, from its configuration alone: 52 MB of cache for a row of 160 positions."""
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(build_full_size_config()).to(torch.bfloat16)
    assert supports(model)
    free, cache = 40 * 2**30, 32 * 2 * 2560 * 160 * 2
    taken = max_batch(model, 120, free) * cache + fast_captioning.WORKSPACE
    assert 0.95 * free < taken <= free
    sizes = [max_batch(model, 120, gib * 2**30) for gib in range(16)]
    assert sizes[0] == 0 and sizes == sorted(sizes)
    assert 12 < max_batch(model, 120, 3 * 2**29) < 24
    assert max_batch(load(tiny_checkpoint), 20, free) > 1000
