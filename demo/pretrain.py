"""Makes demo/base: a small BLIP-2 that has seen drawn scenes, as the real one has seen the web's images.

    python -m demo.pretrain                  # one GPU, minutes; writes demo/base and demo/pretrain.json
    python -m demo.pretrain --only-draw      # the part that needs cores and no GPU; the next run takes it from there

Its captions are worded otherwise than ours and shorter ("rainy night, highway, red light, 3 cars, 1 hidden bus"), so
fine-tuning has our wording to teach. Beside them the language model reads plain English sentences without images,
as OPT had read English before. No scene that is drawn here occurs in the demo's own train, validation or test split.
Deterministic: the same device and torch give the same weights again, whose hash is in the log.

Shapes: B rows, Q image tokens a row, T text tokens, S image side in pixels.
"""

import os

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS is deterministic with it; it is read when CUDA starts

import argparse
import hashlib
import json
import multiprocessing
import platform
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    GPT2Tokenizer,
    OPTConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from captioner.bdd100k.facts import CLASSES, LIGHTS, SCENES, TIMES_OF_DAY, WEATHERS, Facts, ObjectKind
from captioner.bdd100k.frames import read_frame
from captioner.bdd100k.label_report import LabelReport
from captioner.bdd100k.wording import STYLES, describe
from captioner.blip2.batches import IGNORED, CaptionCollator, tokenize_captions
from captioner.blip2.generation import generate_captions, make_generation_config
from captioner.runtime.files import atomic_write
from config import DEMO_DATA, DEMO_FOLDER, DEMO_SCENES
from demo.draw import VERSION, draw_scene

SIDE = 112  # S
QUERIES = 16  # Q
MAX_TOKENS = 96  # of one web caption
FIRST_SCENE, FIRST_TEST_SCENE = 10_000_000, 9_000_000  # seeds, far from the demo's own 0, 1, 2, ...
assert FIRST_TEST_SCENE > DEMO_SCENES


# --------------------------------------------------------------------------------------------------------------
# wording


def write_web_caption(facts: Facts) -> str:
    """The base's wording: all that our captions say, but shorter and with other words."""
    parts = [f"{facts.weather} {facts.time_of_day}", facts.scene]
    if facts.traffic_light:
        parts.append(f"{facts.traffic_light} light")
    for kind, count in sorted(facts.objects.items()):
        if kind.name != "drivable area":
            seen = "hidden " * kind.occluded + "cut " * kind.truncated
            parts.append(f"{count} {seen}{kind.name if count == 1 else CLASSES[kind.name][0]}")
    return ", ".join(parts)


def write_english(rng: random.Random) -> str:
    """A sentence of small-talk English about streets, for the language model alone."""
    name = rng.choice(list(CLASSES))
    noun, count = CLASSES[name][0], rng.randint(2, 30)
    where = rng.choice(["in the scene", "on the road", "near the traffic light", "on a city street", "on the highway"])
    seen = rng.choice(["partially occluded", "truncated", "partially occluded and truncated"])
    return rng.choice(
        [
            f"There is a {name} {where}.",
            f"There are {count} {noun} {where}.",
            f"There is one {rng.choice(LIGHTS)} {name} {where}.",
            f"One {name} is {seen}. The {noun} are {seen}.",
            f"{count} {noun} are {seen} {where}.",
            f"A {seen} {name} is {where}. There are {count} {seen} {noun}.",
            f"It is {rng.choice(TIMES_OF_DAY)} and the weather is {rng.choice(WEATHERS)}.",
            f"It is a {rng.choice(WEATHERS)} scene. The weather {where} is {rng.choice(WEATHERS)}.",
            f"The traffic light {where} is {rng.choice(LIGHTS)}. The {name} is {rng.choice(LIGHTS)}.",
            f"The road is a {rng.choice(list(SCENES))} in the {rng.choice(TIMES_OF_DAY)}.",
            f"The key is visible. Key objects are: {noun}, {count} of them {seen}, both on a {name}.",
        ]
    )


def draw_facts(rng: random.Random) -> Facts:
    """Random facts, for the tokenizer's corpus."""
    kinds = [ObjectKind(name, rng.random() < 0.3, rng.random() < 0.3) for name in rng.sample(list(CLASSES), 5)]
    return Facts(
        rng.choice(TIMES_OF_DAY),
        rng.choice(WEATHERS),
        rng.choice(list(SCENES)),
        rng.choice(LIGHTS),
        {kind: rng.randint(1, 30) for kind in kinds},
    )


# --------------------------------------------------------------------------------------------------------------
# model


def build_processor(side: int = SIDE, queries: int = QUERIES) -> Blip2Processor:
    """Byte-level BPE like OPT's, small enough for the demo, with BLIP-2's special tokens in their places."""
    rng = random.Random(0)
    corpus = []
    for _ in range(4000):
        facts = draw_facts(rng)
        corpus += [write_web_caption(facts), write_english(rng), *(describe(facts, style) for style in STYLES)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    opt_tokenizer = GPT2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="</s>",
    )
    image_processor = BlipImageProcessorPil(size={"height": side, "width": side})
    return Blip2Processor(image_processor, opt_tokenizer, num_query_tokens=queries)


def build_model(processor: Blip2Processor, side: int = SIDE, width: int = 192, layers=(6, 2, 3)):
    """A Blip2ForConditionalGeneration with random weights; `layers` are those of ViT, Q-Former and OPT."""
    tokenizer = processor.tokenizer
    shape = {"hidden_size": width, "num_attention_heads": width // 32}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            **shape, intermediate_size=4 * width, num_hidden_layers=layers[0], image_size=side, patch_size=8
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            **shape,
            intermediate_size=4 * width,
            num_hidden_layers=layers[1],
            encoder_hidden_size=width,
            cross_attention_frequency=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            vocab_size=1,
        ).to_dict(),
        text_config=OPTConfig(
            **shape,
            ffn_dim=4 * width,
            num_hidden_layers=layers[2],
            word_embed_proj_dim=width,
            vocab_size=len(tokenizer),
            max_position_embeddings=320,
            dropout=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.convert_tokens_to_ids("Ċ"),  # the newline, as in BLIP-2
            pad_token_id=tokenizer.pad_token_id,
        ).to_dict(),
        num_query_tokens=processor.num_query_tokens,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens, std=0.5)  # zeros would keep all queries alike
    return model


# --------------------------------------------------------------------------------------------------------------
# scenes


def draw_small(seed: int) -> tuple[bytes, str]:
    """One scene as the processor shrinks it, (S, S, 3) bytes, and its web caption."""
    image, raw = draw_scene(seed)
    small = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return small.tobytes(), write_web_caption(read_frame(raw, LabelReport()).facts)


def draw_scenes(seeds: range, folder: Path) -> tuple[np.ndarray, list[str]]:
    """(N, S, S, 3) uint8 images and their N web captions; kept in `folder` for the next run."""
    kept = folder / f"scenes-v{VERSION}-{seeds.start}-{len(seeds)}"
    images_file, captions_file = kept.with_suffix(".npy"), kept.with_suffix(".json")
    if captions_file.exists():
        return np.load(images_file, mmap_mode="r"), json.loads(captions_file.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    shape = (len(seeds), SIDE, SIDE, 3)
    images, captions = np.lib.format.open_memmap(images_file, "w+", np.uint8, shape), []
    with multiprocessing.Pool() as pool:
        drawn = pool.imap(draw_small, seeds, chunksize=64)
        for row, (image, caption) in enumerate(tqdm(drawn, total=len(seeds), desc="drawing", mininterval=10)):
            images[row] = np.frombuffer(image, np.uint8).reshape(SIDE, SIDE, 3)
            captions.append(caption)
    with atomic_write(captions_file) as file:  # last: it says that the images are complete
        json.dump(captions, file)
    return images, captions


class SceneBatches:
    """Random training batches from scenes that lie on the device, half of them mirrored: that changes no fact."""

    def __init__(self, pixels: np.ndarray, captions: list[str], processor, model, device):
        self.pixels = torch.tensor(pixels, device=device)  # (N, S, S, 3) uint8
        self.processor = processor
        end = model.config.text_config.eos_token_id
        tokens = tokenize_captions(captions, processor, MAX_TOKENS, end)
        batch = CaptionCollator(model.config)([{"pixel_values": torch.empty(0), "caption_ids": ids} for ids in tokens])
        self.text = {key: batch[key].to(device) for key in ("input_ids", "attention_mask", "labels")}

    def sample(self, size: int) -> dict[str, torch.Tensor]:
        index = torch.randint(len(self.pixels), (size,), device=self.pixels.device)
        pixels = self.pixels[index]
        half = size // 2
        pixels[:half] = pixels[:half].flip(2)
        text = {key: value[index] for key, value in self.text.items()}
        return {"pixel_values": normalise_pixels(pixels, self.processor), **text}


def normalise_pixels(pixels: torch.Tensor, processor) -> torch.Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, S, S), scaled and normalised as the processor does it."""
    image = processor.image_processor
    mean, std = (torch.tensor(values, device=pixels.device) for values in (image.image_mean, image.image_std))
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


class EnglishBatches:
    """Random batches of sentences without images, for the language model alone."""

    def __init__(self, processor, model, device, count: int = 20_000):
        rng = random.Random(1)
        end, bos = model.config.text_config.eos_token_id, model.config.text_config.bos_token_id
        texts = [write_english(rng) for _ in range(count)]
        rows = [[bos, *ids] for ids in tokenize_captions(texts, processor, MAX_TOKENS, end)]
        longest, pad = max(map(len, rows)), model.config.text_config.pad_token_id
        self.ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
        self.mask = (self.ids != pad).long()

    def sample(self, size: int) -> dict[str, torch.Tensor]:
        index = torch.randint(len(self.ids), (size,), device=self.ids.device)
        ids, mask = self.ids[index], self.mask[index]
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


# --------------------------------------------------------------------------------------------------------------
# training


def train(model, scenes: SceneBatches, unseen: SceneBatches, english: EnglishBatches, args) -> list[dict]:
    """AdamW, one-cycle, bf16 autocast, every fourth step on English too. Returns the logged losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.05)
    log, device, start, text_loss = [], model.device, time.perf_counter(), torch.tensor(0.0)
    model.train()
    for step in tqdm(range(1, args.steps + 1), desc="pre-training", mininterval=10):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**scenes.sample(args.batch)).loss
            loss.backward()
            if step % 4 == 0:
                text_loss = model.language_model(**english.sample(args.batch // 4)).loss
                (0.4 * text_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == args.steps:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                unseen_loss = model(**unseen.sample(1000)).loss
            seconds = round(time.perf_counter() - start, 1)
            losses = {"loss": loss.item(), "unseen_loss": unseen_loss.item(), "text_loss": text_loss.item()}
            log.append({"step": step, **losses, "seconds": seconds})
            tqdm.write(json.dumps(log[-1]))
    return log


def score(model, processor, pixels: np.ndarray, captions: list[str]) -> dict[str, float]:
    """Shares, in percent, of web captions that are right on unseen scenes: weather and time, scene, light, objects."""
    model.eval()
    generation = make_generation_config(model.config, MAX_TOKENS)
    predictions = []
    for start in range(0, len(captions), 250):
        batch = normalise_pixels(torch.tensor(pixels[start : start + 250], device=model.device), processor)
        predictions += generate_captions(model, processor, batch, generation, do_sample=False)
    right, hits, said, there = Counter(), 0, 0, 0
    for prediction, caption in zip(predictions, captions, strict=True):
        (conditions, scene, *objects), parts = caption.split(", "), prediction.split(", ")
        light = next((part for part in objects if part.endswith(" light")), None)
        right["conditions"] += parts[0] == conditions
        right["scene"] += scene in parts[1:2]
        right["light"] += light == next((part for part in parts if part.endswith(" light")), None)
        right["whole caption"] += prediction == caption
        hits += sum((Counter(parts[2:]) & Counter(objects)).values())
        said += len(parts[2:])
        there += len(objects)
    shares = {name: 100 * count / len(captions) for name, count in right.items()}
    return {**shares, "F1 of objects": 100 * 2 * hits / (said + there)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=120_000, help="scenes drawn for training")
    parser.add_argument("--test-scenes", type=int, default=1_000, help="unseen scenes drawn for the scores")
    parser.add_argument("--steps", type=int, default=4_800, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=768, help="scenes a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--out", type=Path, default=DEMO_FOLDER, help="folder for base/ and pretrain.json")
    parser.add_argument("--scenes-folder", type=Path, default=DEMO_DATA / "pretraining", help="keeps the drawn scenes")
    parser.add_argument("--only-draw", action="store_true", help="stop once the scenes are drawn")
    args = parser.parse_args()

    start = time.perf_counter()
    pixels, captions = draw_scenes(range(FIRST_SCENE, FIRST_SCENE + args.scenes), args.scenes_folder)
    test = draw_scenes(range(FIRST_TEST_SCENE, FIRST_TEST_SCENE + args.test_scenes), args.scenes_folder)
    if args.only_draw:
        return
    drawn = time.perf_counter()

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # its backward pass is not deterministic
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = build_processor()
    model = build_model(processor).to(device)
    scenes = SceneBatches(pixels, captions, processor, model, device)
    unseen = SceneBatches(*test, processor, model, device)
    log = train(model, scenes, unseen, EnglishBatches(processor, model, device), args)
    trained = time.perf_counter()

    base = args.out / "base"
    model.half().save_pretrained(base)
    processor.save_pretrained(base)
    scores = score(model.float(), processor, *test)
    record = {
        "command": f"python -m demo.pretrain --scenes {args.scenes} --steps {args.steps} --batch {args.batch} "
        f"--lr {args.lr} --seed {args.seed}",
        "scores": scores,
        "sha256": hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest(),
        "parameters": model.num_parameters(),
        "renderer": VERSION,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "seconds": {"drawing": round(drawn - start), "training": round(trained - drawn)},
        "log": log,
    }
    (args.out / "pretrain.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({**record, "log": "..."}, indent=1))


if __name__ == "__main__":
    main()
