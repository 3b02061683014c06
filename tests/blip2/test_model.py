"""Loading, NF4, LoRA, masking and generation, on a tiny BLIP-2 with random weights."""

import copy
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing

from captioner.blip2 import batches, generation
from captioner.blip2 import loading as blip2
from captioner.blip2.lora import add_lora
from captioner.blip2.pixels import load_pixels
from captioner.data.examples import Example
from captioner.fast import packing
from captioner.runtime.errors import UserError

CPU = torch.device("cpu")
CAPTIONS = ["It is a night scene in rainy weather on a highway road.", "There are 3 cars."]


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return blip2.load_processor(tiny_checkpoint)


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return blip2.load_model(tiny_checkpoint, load_in_4bit=True, device=CPU)


@pytest.fixture
def lora(tiny_checkpoint):
    torch.manual_seed(0)
    return add_lora(blip2.load_model(tiny_checkpoint, True, CPU), "both", rank=8, alpha=16, dropout=0.0)


@pytest.fixture
def dataset(tmp_path, processor, base):
    examples = []
    for index, caption in enumerate(CAPTIONS):
        image = tmp_path / f"{index}.png"
        Image.new("RGB", (64, 36), ["black", "white"][index]).save(image)
        examples.append(Example(image.name, image, caption))
    return batches.make_dataset(examples, processor, 256, base.config.text_config.eos_token_id)


def make_batch(dataset, model, rows=(0, 1)):
    return batches.CaptionCollator(model.config)([dataset[row] for row in rows])


def fit(model, batch, steps=150):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_only_caption_and_end_carry_loss(dataset, base, processor):
    batch = make_batch(dataset, base)
    config = base.config
    for row, caption in enumerate(CAPTIONS):
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        text = processor.tokenizer(caption, add_special_tokens=False)["input_ids"]
        start, end = config.num_query_tokens + 1, config.num_query_tokens + 1 + len(text)
        assert (ids[: start - 1] == config.image_token_index).all()
        assert ids[start - 1] == config.text_config.bos_token_id
        assert ids[start:end].tolist() == text
        assert ids[end] == config.text_config.eos_token_id
        assert processor.tokenizer.decode(ids[end]) == "\n"
        assert (ids[end + 1 :] == config.text_config.pad_token_id).all()
        carries_loss = torch.zeros(len(ids), dtype=torch.bool)
        carries_loss[start : end + 1] = True
        assert ((labels != batches.IGNORED) == carries_loss).all()
        assert (labels[carries_loss] == ids[carries_loss]).all()
        assert (batch["attention_mask"][row] == (torch.arange(len(ids)) <= end)).all()
    assert (batch["input_ids"] == config.image_token_index).sum(1).tolist() == [config.num_query_tokens] * 2


def test_packed_rows_are_labelled_with_the_next_token(base):
    config = base.config
    queries, bos = config.num_query_tokens, config.text_config.bos_token_id
    for positions, longest in ((64, 64), (65, 128)):
        captions = [[11, 12, 7], [7], list(range(100, 100 + positions - queries))]
        rows = [{"pixel_values": torch.zeros(1), "caption_ids": caption} for caption in captions]
        batch = packing.PackedCollator(config)(rows)
        starts = batch["starts"].tolist()
        for caption, start, end in zip(captions, starts, starts[1:], strict=False):
            image = [config.image_token_index] * queries
            assert batch["input_ids"][start:end].tolist() == [*image, bos, *caption[:-1]]
            assert batch["labels"][start:end].tolist() == [batches.IGNORED] * queries + caption
        assert len(starts) == len(captions) + 2 and len(batch["labels"]) == len(batch["input_ids"]) == starts[-1]
        assert (batch["labels"][starts[-2] :] == batches.IGNORED).all()
        assert starts[-1] % 32 == 16 and starts[-1] - starts[-2] < 32
        assert batch["longest"] == longest


def test_a_cut_caption_keeps_its_end_token(processor):
    caption = "There are 3 cars. There is one bus."
    [cut, same] = batches.tokenize_captions([caption] * 2, processor, max_tokens=4, end=7)
    [whole] = batches.tokenize_captions([caption], processor, max_tokens=99, end=7)
    assert cut == same == [*whole[:4], 7]
    assert processor.tokenizer.decode(whole[:-1]) == caption
    assert batches.tokenize_captions([], processor, max_tokens=4, end=7) == []


def test_padding_does_not_change_the_loss(dataset, base):
    """The loss of a batch is the mean over its caption tokens, whatever the padding."""
    both = make_batch(dataset, base)
    rows = [make_batch(dataset, base, [row]) for row in range(2)]
    tokens = [(batch["labels"] != batches.IGNORED).sum() for batch in rows]
    with torch.no_grad():
        mean = sum(base(**batch).loss * count for batch, count in zip(rows, tokens, strict=True)) / sum(tokens)
        assert base(**both).loss.item() == pytest.approx(mean.item(), rel=1e-5)


def test_caption_learnt_by_heart_is_generated_and_stops(dataset, lora, processor):
    batch = make_batch(dataset, lora)
    fit(lora, batch)
    settings = generation.make_generation_config(lora.config, max_new_tokens=100)
    captions = generation.generate_captions(lora, processor, batch["pixel_values"], settings, do_sample=False)
    assert captions == CAPTIONS  # two images, two captions: the image matters, and both stop long before 100 tokens


def test_a_batch_equals_its_rows(dataset, lora, processor):
    batch = make_batch(dataset, lora)
    fit(lora, batch, steps=10)
    settings = generation.make_generation_config(lora.config, max_new_tokens=40)
    together = generation.generate_captions(lora, processor, batch["pixel_values"], settings, do_sample=False)
    alone = [
        generation.generate_captions(lora, processor, pixels[None], settings, do_sample=False)[0]
        for pixels in batch["pixel_values"]
    ]
    assert together == alone


@pytest.mark.parametrize("target", ["qformer", "lm", "both"])
def test_only_lora_changes(tiny_checkpoint, dataset, target):
    model = add_lora(blip2.load_model(tiny_checkpoint, True, CPU), target, 4, 8, 0.0)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert {"vision_model" in name for name in trainable} == {False}
    assert any("qformer" in name for name in trainable) == (target in ("qformer", "both"))
    assert any("language_model" in name for name in trainable) == (target in ("lm", "both"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit(model, make_batch(dataset, model), steps=3)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in before if "lora_B" in name} <= changed
    assert all("lora_" in name for name in changed)


def test_saved_adapter_reloads_to_the_same_logits(tiny_checkpoint, dataset, lora, tmp_path):
    from peft import PeftModel

    batch = make_batch(dataset, lora)
    fit(lora, batch, steps=5)
    lora.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(blip2.load_model(tiny_checkpoint, True, CPU), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, lora(**batch).logits)


def test_all_linears_of_vit_and_opt_are_nf4(base):
    quantised = {name for name, module in base.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    linears = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    kept = linears - quantised
    assert {name for name in kept if "qformer" not in name} == {"language_model.lm_head"}
    assert {name for name in quantised if "qformer" in name} == set()
    assert all(base.get_submodule(name).weight.quant_state.quant_type == "nf4" for name in quantised)


def test_fp4_is_noticed(tiny_checkpoint, monkeypatch):
    """The reference misspelt a key and trained on FP4."""
    real = blip2.BitsAndBytesConfig
    monkeypatch.setattr(
        blip2, "BitsAndBytesConfig", lambda bnb_4bit_quant_type, **rest: real(bnb4bit_quant_type="nf4", **rest)
    )
    with pytest.raises(UserError, match=r"not NF4.*fp4"):
        blip2.load_model(tiny_checkpoint, True, CPU)


def test_full_size_model_is_refused_on_a_cpu(tmp_path):
    """Refused from its config.json alone, before any weights are fetched."""
    from transformers import Blip2Config, OPTConfig

    opt = OPTConfig(hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32)
    Blip2Config(text_config=opt.to_dict(), image_token_index=50265).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"3\.\d billion parameters.*--demo"):
        blip2.load_model(tmp_path, True, CPU)


@pytest.mark.parametrize("name", ["./no-such-folder", "/no/such/folder", "no-such-folder/"])
def test_a_missing_model_folder_is_named(name):
    with pytest.raises(UserError, match="no model folder"):
        blip2.load_processor(name)


def test_model_from_the_hub_without_network():
    with pytest.raises(UserError, match=r"Salesforce/blip2-opt-2.7b.*connection.*--demo"):
        blip2.load_model("Salesforce/blip2-opt-2.7b", True, CPU)


@pytest.mark.parametrize("blank", [False, True])
def test_pixels_are_those_of_the_processor(drawn, processor, blank):
    for path in sorted((drawn / "images").iterdir())[:3]:
        image = Image.open(path).convert("RGB")
        image = Image.new("RGB", image.size) if blank else image
        expected = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(load_pixels(path, processor, blank), expected)


def test_unreadable_image_is_named(tmp_path, processor):
    bad = tmp_path / "bad.jpg"
    bad.write_text("no image")
    with pytest.raises(UserError, match=r"bad\.jpg: not readable as an image"):
        load_pixels(bad, processor)


def test_a_caption_has_no_token_that_its_text_has_not(processor):
    """OPT's tokenizer would begin each with its end token."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    start = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    assert tokenizer(CAPTIONS[1])["input_ids"][0] == start[1]
    [ids] = batches.tokenize_captions(CAPTIONS[1:], SimpleNamespace(tokenizer=tokenizer), 256, 7)
    assert ids == [*processor.tokenizer(CAPTIONS[1], add_special_tokens=False)["input_ids"], 7]
    assert batches.tokenize_captions([], processor, 256, 7) == []
