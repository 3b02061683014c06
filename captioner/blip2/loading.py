"""Loading BLIP-2: from the hub or a folder, in NF4 or 16 bits, with or without a trained adapter."""

import os
import re
import warnings
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    GenerationConfig,
    PreTrainedModel,
)

from captioner.blip2.image_size import resize_positions, set_image_size, set_processor_size
from captioner.blip2.lora import LORA_TARGETS
from captioner.blip2.trust import check_adapter_folder, check_model_folder
from captioner.data.run_record import ADAPTER_WEIGHTS, read_run
from captioner.runtime.errors import UserError
from captioner.runtime.files import split_revision
from captioner.runtime.processes import share_folder

# peft 0.21 asks transformers by a name that is dropped in v6.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


CPU_PARAMETERS = 3e8  # a larger model is refused on a CPU: a step would take minutes
BYTES_PER_PARAMETER = {"nf4": 0.57, "half": 2.0}  # of the frozen weights on a GPU; NF4 includes its scales
ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)")  # as in sm_75, sm_90a, compute_120
TRAINING_MARGIN = 1.0  # GiB beside the weights, below which not even a micro-batch of 1 fits


def pick_device() -> torch.device:
    """This process's GPU, else the CPU. Raises UserError for a GPU that this torch has no kernels for."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        device = torch.device("cuda", torch.cuda.current_device())
        check_architecture(device)
        return device
    return torch.device("cpu")


def check_architecture(device: torch.device) -> None:
    """Raise UserError if torch was not built for the GPU: is_available() is True there all the same.

    Code for sm_XY runs on GPUs of the same X from Y on, code for compute_XY on those and all newer ones (CUDA C++
    Programming Guide, binary and PTX compatibility).
    """
    built, capability = torch.cuda.get_arch_list(), torch.cuda.get_device_capability(device)
    parsed = [match.groups() for match in map(ARCHITECTURE.match, built) if match]
    for kind, major, minor in parsed:
        version = (int(major), int(minor))
        if version <= capability and (kind == "compute" or version[0] == capability[0]):
            return
    if parsed:  # ROCm's names are others
        raise UserError(
            f"{torch.cuda.get_device_name(device)} (sm_{capability[0]}{capability[1]}): torch {torch.__version__} has "
            f"kernels for {', '.join(built)} alone; take another GPU, such as Kaggle's T4 instead of its P100, or "
            "install a wheel that has them: pip install torch --index-url https://download.pytorch.org/whl/cu126"
        )


def pick_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the GPU has it, else fp16; fp32 on a CPU."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_processor(
    source: str | Path, image_size: int | None = None, model_config: Blip2Config | None = None
) -> Blip2Processor:
    """The processor of a checkpoint; images are prepared with Pillow, so torchvision is not needed.

    Raises UserError when its tokens are not those of a model of `model_config`.
    """
    processor = load_pretrained(Blip2Processor, source, backend="pil")
    set_processor_size(processor, image_size)
    if model_config is not None:
        token, tokens = processor.tokenizer.convert_tokens_to_ids("<image>"), len(processor.tokenizer)
        wanted, vocabulary = model_config.image_token_index, model_config.text_config.vocab_size
        if token != wanted or tokens > vocabulary:
            raise UserError(
                f"{source}: its tokenizer has {tokens} tokens and <image> as {token}, the model {vocabulary} and "
                f"{wanted}: a file is missing, such as tokenizer.json, or it is for another base model"
            )
    return processor


def load_config(source: str | Path) -> Blip2Config:
    """The model's configuration. Fetches config.json only. Raises UserError unless it is a BLIP-2 with an OPT."""
    config = load_pretrained(AutoConfig, source)
    if config.model_type != "blip-2" or not config.use_decoder_only_language_model:
        raise UserError(f"{source}: a {config.model_type} model; --model takes a BLIP-2 checkpoint with an OPT")
    if config.image_token_index is None:
        raise UserError(f"{source}: its config.json has no image_token_index; fetch the checkpoint's latest revision")
    return config


def check_model(
    source: str | Path, load_in_4bit: bool, device: torch.device, image_size: int | None = None
) -> Blip2Config:
    """The configuration for images of that size. Raises UserError also for a model that does not fit the device."""
    config = load_config(source)
    set_image_size(config, image_size)
    check_fits(source, config, load_in_4bit, device)
    return config


def load_model(
    source: str | Path, load_in_4bit: bool, device: torch.device, image_size: int | None = None, checked: bool = False
) -> Blip2ForConditionalGeneration:
    """Load a BLIP-2 checkpoint onto `device`, frozen, its linear layers in NF4 if asked for, for images of that size.

    Raises UserError when it can't be had, is no BLIP-2 with an OPT, or is too large for the device; the last two are
    taken for granted if check_model() was `checked` before.
    """
    if not checked:
        check_model(source, load_in_4bit, device, image_size)
    dtype = pick_dtype(device)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    where = {"dtype": dtype, "device_map": {"": device}}
    model = load_weights(source, image_size, quantization_config=quantization if load_in_4bit else None, **where)
    model.requires_grad_(False)
    if load_in_4bit:
        check_nf4(model)
    return model


def load_weights(source: str | Path, image_size: int | None, **options) -> Blip2ForConditionalGeneration:
    """A BLIP-2 for images of that size (None: the checkpoint's), with all its weights; `options` of from_pretrained."""
    model, loading = load_pretrained(Blip2ForConditionalGeneration, source, output_loading_info=True, **options)
    if wrong := sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]])):
        raise UserError(
            f"{source}: {len(wrong)} weights are missing or of another shape, {wrong[0]} for one; fetch it again"
        )
    set_image_size(model.config, image_size)
    resize_positions(model)
    return model


def count_parameters(config: Blip2Config) -> int:
    """How many parameters the model has that `config` describes. No memory is taken."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Blip2ForConditionalGeneration(config).parameters())


def check_fits(source, config, load_in_4bit: bool, device: torch.device) -> None:
    """Raise UserError if the model that `config` describes is out of the device's reach, before weights are fetched."""
    parameters = count_parameters(config)
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


def load_pretrained(auto_class, source: str | Path, **options):
    """auto_class.from_pretrained, its failures as one UserError."""
    local, text = Path(source), str(source)
    is_local = local.is_absolute() or text.startswith((".", "~")) or text.endswith("/") or local.exists()
    if is_local and not any((local / name).is_file() for name in ("config.json", "processor_config.json")):
        raise UserError(f"{source}: no model folder (no config.json in it); --model takes a folder or a hub name")
    if is_local:
        check_model_folder(local)
    else:
        source, options["revision"] = split_revision(text)
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


def load_finetuned(folder: Path, device: torch.device, base: bool = False, model: str | None = None):
    """(model, processor, generation settings) of a folder that main.py wrote; `base` leaves the adapter out.

    `model`: where the base model is by now, if not where main.py had it. Called in all processes; the main one's folder
    counts.
    """
    with share_folder(folder) as here:
        run = read_run(here)
        source, size = run["config"]["model"], run["config"].get("image_size")
        check_adapter_folder(here, LORA_TARGETS.values(), split_revision(source)[0])
        blip2 = load_model(model or source, run["config"]["load_in_4bit"], device, size)
        processor = load_processor(here, model_config=blip2.config)
        check_adapter_fits(here, blip2)
        if not base:
            with torch.device(blip2.device):  # as in add_lora
                blip2 = PeftModel.from_pretrained(blip2, here)
        return blip2.eval(), processor, load_generation(here)


def load_generation(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / 'generation_config.json'}: can't be read ({reason}); copy it there again") from None


def check_adapter_fits(folder: Path, model) -> None:
    """Raise UserError when the adapter in `folder` was made for a model of other layers."""
    remedy = f"is for another base model than {model.name_or_path}: give the one that it was trained on"
    modules = dict(model.named_modules())
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / ADAPTER_WEIGHTS}: can't be read ({error}); copy it there again, or train") from None
    for key, shape in shapes.items():
        name, _, matrix = key.removeprefix("base_model.model.").partition(".lora_")
        layer = modules.get(name)
        side = {"A.weight": 1, "B.weight": 0}.get(matrix)
        size = getattr(layer, "in_features" if side else "out_features", None)
        if side is None or size is None or len(shape) != 2 or shape[side] != size:
            raise UserError(f"{folder / ADAPTER_WEIGHTS}: {key[:200]} has shape {shape}, its layer {size}; it {remedy}")
