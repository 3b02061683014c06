"""BLIP-2: loading, NF4, LoRA, batches with masked labels, generation. What main.py and eval.py share.

Shapes: B rows, Q image tokens a row (32 in BLIP-2), T text tokens, S image side in pixels (224), P positions of the
ViT (257), D its width (1408), N positions of a batch together.
A row of a training batch is [Q x <image>][bos][caption][newline][padding]; only caption and newline carry loss.
The newline is OPT's end token in BLIP-2: a model that was not trained to write it never stops.
"""

import functools
import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    GenerationConfig,
    PreTrainedModel,
)

from captioner.blip2.trust import ADAPTER_WEIGHTS, check_adapter_folder, check_model_folder
from captioner.data.captions import Example
from captioner.data.images import open_picture
from config import UserError, split_revision

# peft 0.21 asks transformers by a name that is dropped in v6.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

IGNORED = -100  # label of a position that carries no loss
PACKED_TO, SLOW = 8, 32  # positions of a packed batch are a multiple of the one and not of the other,
SMALL = 1024  # and up to so many a multiple of twice the one
LONGEST_TO = 64  # what positions of its longest row are rounded up to

# fc1 and fc2 name layers of the frozen ViT too, so LoRA's targets are expressions over whole module names.
LORA_TARGETS = {
    "qformer": r"qformer\..*\.(query|key|value|dense)",
    "lm": r"language_model\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
}
LORA_TARGETS["both"] = f"({LORA_TARGETS['qformer']}|{LORA_TARGETS['lm']})"

CPU_PARAMETERS = 3e8  # a larger model is refused on a CPU: a step would take minutes
BYTES_PER_PARAMETER = {"nf4": 0.57, "half": 2.0}  # of the frozen weights on a GPU; NF4 includes its scales
TRAINING_MARGIN = 1.0  # GiB beside the weights, below which not even a micro-batch of 1 fits


# --------------------------------------------------------------------------------------------------------------
# loading


def pick_device() -> torch.device:
    """This process's GPU, else the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def pick_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the GPU has it, else fp16; fp32 on a CPU."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_processor(source: str | Path) -> Blip2Processor:
    """The processor of a checkpoint; pictures are prepared with Pillow, so torchvision is not needed."""
    return _load(Blip2Processor, source, backend="pil")


def load_config(source: str | Path) -> Blip2Config:
    """The model's configuration. Fetches config.json only. Raises UserError unless it is a BLIP-2 with an OPT."""
    config = _load(AutoConfig, source)
    if config.model_type != "blip-2" or not config.use_decoder_only_language_model:
        raise UserError(f"{source}: a {config.model_type} model; --model takes a BLIP-2 checkpoint with an OPT")
    if config.image_token_index is None:
        raise UserError(f"{source}: its config.json has no image_token_index; fetch the checkpoint's latest revision")
    return config


def check_model(source: str | Path, load_in_4bit: bool, device: torch.device) -> Blip2Config:
    """The same, of a model that fits the device; else raises UserError."""
    config = load_config(source)
    check_fits(source, config, load_in_4bit, device)
    return config


def load_model(
    source: str | Path, load_in_4bit: bool, device: torch.device, checked: bool = False
) -> Blip2ForConditionalGeneration:
    """Load a BLIP-2 checkpoint onto `device`, frozen, its linear layers in NF4 if asked for.

    Raises UserError when it can't be had, is no BLIP-2 with an OPT, or is too large for the device; the last two are
    taken for granted if check_model() was `checked` before.
    """
    if not checked:
        check_model(source, load_in_4bit, device)
    dtype = pick_dtype(device)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model, loading = _load(
        Blip2ForConditionalGeneration,
        source,
        output_loading_info=True,
        dtype=dtype,
        device_map={"": device},
        quantization_config=quantization if load_in_4bit else None,
    )
    if loading["missing_keys"] or loading["mismatched_keys"]:
        wrong = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
        raise UserError(
            f"{source}: {len(wrong)} weights are missing or of another shape, {wrong[0]} for one; fetch it again"
        )
    model.requires_grad_(False)
    if load_in_4bit:
        check_nf4(model)
    return model


def check_fits(source, config, load_in_4bit: bool, device: torch.device) -> None:
    """Raise UserError if the model that `config` describes is out of the device's reach, before weights are fetched."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Blip2ForConditionalGeneration(config).parameters())
    billions = parameters / 1e9
    if device.type == "cpu":
        if parameters > CPU_PARAMETERS:
            raise UserError(
                f"{source} has {billions:.1f} billion parameters and needs an NVIDIA GPU, but torch "
                f"{torch.__version__} sees none; check nvidia-smi and that torch is a CUDA build, or try --demo, which "
                "runs on a CPU"
            )
        return
    need = parameters * BYTES_PER_PARAMETER["nf4" if load_in_4bit else "half"] / 2**30 + TRAINING_MARGIN
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
    if free < need:
        raise UserError(
            f"{source} with {billions:.1f} billion parameters needs at least {need:.1f} GiB of GPU memory, but "
            f"{torch.cuda.get_device_name(device)} has {free:.1f} of {total:.1f} GiB free; close what else uses it, "
            "keep --load-in-4bit, take a larger GPU, or try --demo"
        )


def check_nf4(model: torch.nn.Module) -> None:
    """Raise UserError unless every 4-bit layer is NF4 with double quantisation: a misspelt key would give FP4."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    if not layers:
        raise UserError("the model has no 4-bit layer: bitsandbytes did not quantise it; check its installation")
    for name, layer in layers.items():
        state = layer.weight.quant_state
        if state is None or state.quant_type != "nf4" or not state.nested:
            kind = state and f"{state.quant_type}, double quantisation {state.nested}"
            raise UserError(f"{name} is not NF4 with double quantisation but {kind}; check the bitsandbytes version")
        # On CPUs with AVX512-BF16 the first evaluation would re-pack the weights, and training after it crash.
        layer.support_avx512bf16_for_cpu = False


LOADING_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError)


def find_broken_connection(error: BaseException | None) -> BaseException | None:
    """What the hub's HTTP client raised, if `error` came of it: huggingface_hub lets that through when a file of
    several breaks off, and transformers puts advice on folder names in its place when it is one file."""
    while error is not None:
        if type(error).__module__.startswith("httpx") and type(error).__name__ != "HTTPStatusError":
            return error
        error = error.__cause__ or error.__context__
    return None


def _load(auto_class, source: str | Path, **options):
    """auto_class.from_pretrained, its failures as one UserError."""
    local = Path(source)
    is_local = local.is_absolute() or str(source).startswith((".", "~")) or local.exists()
    if is_local and not any((local / name).is_file() for name in ("config.json", "processor_config.json")):
        raise UserError(f"{source}: no model folder (no config.json in it); --model takes a folder or a hub name")
    if is_local:
        check_model_folder(local)
    else:
        source, options["revision"] = split_revision(str(source))
    if issubclass(auto_class, PreTrainedModel):
        options["use_safetensors"] = True  # a pickle may run code
        os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # nor are weights taken from a pull request that has some
    try:
        return auto_class.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:
        broken = find_broken_connection(error)
        if broken is None and not isinstance(error, LOADING_ERRORS):
            raise
        reason = " ".join(str(broken or error).split())[:300]
        if "safetensors" in reason:
            raise UserError(
                f"{source}: the model can't be loaded ({reason}). Weights are read from safetensors alone: take a "
                "model that has them"
            ) from None
        raise UserError(
            f"{source}: the model can't be loaded ({reason}). Check the name, the connection and the disk; with "
            "HF_HUB_OFFLINE=1 only a model that was fetched before is found; --demo needs no network"
        ) from None


# --------------------------------------------------------------------------------------------------------------
# LoRA and the saved folder


def add_lora(model, target: str, rank: int, alpha: int, dropout: float) -> PeftModel:
    """Put trainable LoRA matrices on the frozen model's linear layers that `target`, a key of LORA_TARGETS, names."""
    lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_TARGETS[target], bias="none")
    with torch.device(model.device):  # where first weights are drawn: a CPU takes a second for them
        return get_peft_model(model, lora)


def load_finetuned(folder: Path, device: torch.device, base: bool = False):
    """(model, processor, generation settings) of a folder that main.py wrote; `base` leaves the adapter out."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: no fine-tuned model in it; train one with python main.py --output {folder}")
    run = read_run(folder)
    source = run["config"]["model"]
    check_adapter_folder(folder, LORA_TARGETS.values(), split_revision(source)[0])
    model, processor = load_model(source, run["config"]["load_in_4bit"], device), load_processor(folder)
    check_adapter_fits(folder, model, processor)
    if not base:
        with torch.device(model.device):  # as in add_lora
            model = PeftModel.from_pretrained(model, folder)
    return model.eval(), processor, GenerationConfig.from_pretrained(folder)


def check_adapter_fits(folder: Path, model, processor: Blip2Processor) -> None:
    """Raise UserError when the adapter in `folder` was made for a model of other tokens or layers."""
    token, tokens = processor.tokenizer.convert_tokens_to_ids("<image>"), len(processor.tokenizer)
    wanted, vocabulary = model.config.image_token_index, model.config.text_config.vocab_size
    remedy = f"is for another base model than {model.name_or_path}: give the one that it was trained on"
    if token != wanted or tokens > vocabulary:
        raise UserError(
            f"{folder}: its tokenizer has {tokens} tokens and <image> as {token}, the model {vocabulary} and {wanted}; "
            f"it {remedy}"
        )
    modules = dict(model.named_modules())
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / ADAPTER_WEIGHTS}: can't be read ({error}); train again") from None
    for key, shape in shapes.items():
        name, _, matrix = key.removeprefix("base_model.model.").partition(".lora_")
        layer = modules.get(name)
        side = {"A.weight": 1, "B.weight": 0}.get(matrix)
        size = getattr(layer, "in_features" if side else "out_features", None)
        if side is None or size is None or len(shape) != 2 or shape[side] != size:
            raise UserError(f"{folder / ADAPTER_WEIGHTS}: {key[:200]} has shape {shape}, its layer {size}; it {remedy}")


def read_run(folder: Path) -> dict:
    """What main.py wrote about its run: configuration, pictures, versions."""
    try:
        run = json.loads((folder / "run.json").read_text())
        if not isinstance(run, dict) or not isinstance(run.get("config"), dict):
            raise ValueError("no JSON object with a config")
        return run
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / 'run.json'}: can't be read ({error}); train again with python main.py") from None


# --------------------------------------------------------------------------------------------------------------
# batches


def load_pixels(image: Path, processor: Blip2Processor, blank: bool = False) -> Tensor:
    """(3, S, S) pixel values of a picture file, or of a black picture of its size.

    The same numbers as the processor gives, which copies the picture several times on its way.
    """
    picture, prepare = open_picture(image), processor.image_processor
    if blank:
        picture = Image.new("RGB", picture.size)
    if not (prepare.do_resize and prepare.do_rescale and prepare.do_normalize and "height" in prepare.size):
        return prepare(picture, return_tensors="pt")["pixel_values"][0]
    small = np.asarray(picture.resize((prepare.size["width"], prepare.size["height"]), prepare.resample))  # (S, S, 3)
    values = list_values(prepare)
    return torch.from_numpy(np.stack([values[channel].take(small[:, :, channel]) for channel in range(3)]))


@functools.cache
def list_values(image_processor) -> np.ndarray:
    """(3, 256) pixel values that the processor makes of each level of each channel."""
    levels = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, axis=2)  # a picture of 256 x 1
    made = image_processor(Image.fromarray(levels), do_resize=False, return_tensors="np")["pixel_values"][
        0
    ]  # (3, 1, 256)
    return np.ascontiguousarray(made[:, 0], dtype=np.float32)


def end_token(model_config) -> int:
    """The token that ends a caption: OPT's own end token in BLIP-2, a newline."""
    return model_config.text_config.eos_token_id


def tokenize_captions(captions: Sequence[str], processor: Blip2Processor, max_tokens: int, end: int) -> list[list[int]]:
    """Tokens of each caption and the end token, which comes after any cut so that it is never lost."""
    tokens = processor.tokenizer(list(captions), add_special_tokens=False)["input_ids"] if captions else []
    return [[*ids[:max_tokens], end] for ids in tokens]


class CaptionDataset(Dataset):
    """Examples as {"index": place, "pixel_values": (3, S, S), "caption_ids": list of tokens with the end token}.

    Once `features` holds the ViT's outputs (see vision_store.py), they stand in for the pixels.
    """

    def __init__(self, examples: Sequence[Example], processor: Blip2Processor, max_tokens: int, end: int):
        self.examples, self.processor = examples, processor
        self.caption_ids = tokenize_captions([e.caption for e in examples], processor, max_tokens, end)
        self.features: Tensor | None = None  # (N, P, D)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        if self.features is not None:
            pixels = self.features[index]
        else:
            pixels = load_pixels(self.examples[index].image, self.processor)
        return {"index": index, "pixel_values": pixels, "caption_ids": self.caption_ids[index]}


def prefix_ids(model_config) -> list[int]:
    """[Q x <image>][bos]: what stands before the text, in training as in generation."""
    image = [model_config.image_token_index] * model_config.num_query_tokens
    return [*image, model_config.text_config.bos_token_id]


class CaptionCollator:
    """Rows of CaptionDataset -> a batch for Blip2ForConditionalGeneration, right-padded to the longest caption."""

    def __init__(self, model_config):
        self.prefix = prefix_ids(model_config)
        self.pad = model_config.text_config.pad_token_id

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        longest = max(len(row["caption_ids"]) for row in rows)
        input_ids, labels, mask = [], [], []
        for row in rows:
            caption = row["caption_ids"]
            padding = longest - len(caption)
            input_ids.append(self.prefix + caption + [self.pad] * padding)
            labels.append([IGNORED] * len(self.prefix) + caption + [IGNORED] * padding)
            mask.append([1] * (len(self.prefix) + len(caption)) + [0] * padding)
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),  # (B, 3, S, S)
            "input_ids": torch.tensor(input_ids),  # (B, Q+1+T)
            "attention_mask": torch.tensor(mask),  # (B, Q+1+T)
            "labels": torch.tensor(labels),  # (B, Q+1+T)
        }


class PackedCollator(CaptionCollator):
    """Rows of CaptionDataset -> a batch for caption_nll: rows behind each other, without padding between them.

    A label is the token to predict at its place, the next one: a caption's last token is predicted, and never read.
    Padding behind the last row leaves few sizes of batches, for which cuBLAS is fast: multiples of 32 positions take an
    H100 up to 8 % longer, and odd multiples of 8 up to 3 % where they are few (benchmarks/RESULTS.md).
    """

    def __call__(self, rows: list[dict]) -> dict[str, Tensor | int]:
        input_ids, labels, starts = [], [], [0]
        for row in rows:
            input_ids += self.prefix + row["caption_ids"][:-1]
            labels += [IGNORED] * (len(self.prefix) - 1) + row["caption_ids"]
            starts.append(len(labels))
        longest = len(self.prefix) - 1 + max(len(row["caption_ids"]) for row in rows)
        multiple = PACKED_TO * (1 + (len(labels) <= SMALL))
        padding = -len(labels) % multiple
        padding += multiple * ((len(labels) + padding) % SLOW == 0)
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),  # (B, 3, S, S)
            "input_ids": torch.tensor(input_ids + [self.pad] * padding),  # (N,)
            "labels": torch.tensor(labels + [IGNORED] * padding),  # (N,)
            "starts": torch.tensor([*starts, len(labels) + padding]),  # (B+2,) of the rows and of what is behind them
            "longest": -(-longest // LONGEST_TO) * LONGEST_TO,
        }


# --------------------------------------------------------------------------------------------------------------
# generation


def make_generation_config(model_config, max_new_tokens: int) -> GenerationConfig:
    """Settings that are saved beside the adapter; generate() of BLIP-2 knows none of them by itself."""
    text = model_config.text_config
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )


@torch.inference_mode()
def generate_captions(model, processor, pixel_values: Tensor, generation: GenerationConfig, **options) -> list[str]:
    """Captions of pixel_values (B, 3, S, S); `options` override `generation` (do_sample, temperature, ...).

    Where the ViT's outputs (B, P, D) stand in for it (see vision_store.py), pixel_values are those.
    """
    prefix = torch.tensor([prefix_ids(model.config)], device=model.device).expand(len(pixel_values), -1)  # (B, Q+1)
    tokens = model.generate(
        pixel_values=pixel_values.to(model.device),  # the ViT takes any precision
        input_ids=prefix,
        attention_mask=torch.ones_like(prefix),
        generation_config=GenerationConfig(**{**generation.to_diff_dict(), **options}),
    )  # (B, Q+1+T): the prefix comes back too
    return decode_captions(processor, tokens[:, prefix.shape[1] :])


def decode_captions(processor, tokens: Tensor) -> list[str]:
    """Captions of new tokens (B, N), each on one line."""
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    return [re.sub(r"\s+", " ", text).strip() for text in texts]
