"""Settings of the three scripts: small groups of what belongs together. Each field's comment is its --help, with units.

A field's name is its flag and its name in run.json, whatever group it is in. A script reads its settings before it
imports anything heavy, so that --help and a misspelt flag answer at once:

    config = parse_args(TrainConfig)
    import torch

    config.lora.lora_rank                            # --lora-rank
    make_config(TrainConfig, lora_rank=8, seed=1)    # the same without a command line
"""

import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from captioner.bdd100k.wording import Style
from captioner.runtime.errors import UserError
from captioner.runtime.settings import Config, check, flatten, make_config, read_flags, setting

DEMO_FOLDER = Path(__file__).parent / "demo"  # the renderer and the small base model
DEMO_DATA = Path("demo-data")  # what the renderer draws
CAPTION_FILES = (".csv", ".tsv", ".txt", ".json", ".jsonl")  # what needs a folder of images; else it is a data set
DEMO_SCENES = 1400  # drawn for --demo: 800 to train, 80 to validate, 520 to test

# The newest revision as of 2026-11, in safetensors: a repository that changes does not change what is trained.
BASE_MODEL = "Salesforce/blip2-opt-2.7b@59a1ef6c1e5117b3f65523d1c6066825bcf315e3"


# Marks of a field. `free`: it does not change what is learnt, so that a run may go on with another value (labels and
# images may lie elsewhere: what they hold is compared by its fingerprint). `unlisted`: the model card leaves it out.

# --------------------------------------------------------------------------------------------------------------
# groups


@dataclass(frozen=True)
class SourceSettings:
    """Labels, and how they are worded."""

    # BDD100K label files or folders; none: those of the Kaggle data set
    labels: tuple[Path, ...] = setting((), free=True)
    # Kaggle handle with its version
    kaggle_dataset: str = setting("solesensei/solesensei_bdd100k/versions/2", unlisted=True)
    # Kaggle labels to use: 10,000 frames, 70,000 or all
    subset: Literal["val", "train", "both"] = setting("val", unlisted=True)
    style: Style = "plain"  # wording of the captions
    class_names: Literal["file", "2018", "det20"] = "file"  # person (2018) or pedestrian (det20); file: as labelled
    lanes: bool = True  # count lanes and drivable areas like objects
    merge_duplicates: bool = False  # count boxes of one class that overlap by IoU > 0.85 once
    min_box_size: float = 0.0  # pixels of its shorter side below which a box is not counted; lights show at any size
    without_scene: Literal["skip", "caption"] = "skip"  # frames with no scene attributes; caption: no first sentence
    # stop at labels with any frame that can't be used or any unknown class or value
    strict: bool = setting(False, unlisted=True)

    def __post_init__(self):
        check(self, "0 or more", lambda value: value >= 0, "min_box_size")


@dataclass(frozen=True)
class DataSettings:
    """Captions with their images, and how they are split."""

    # folder with the images, searched to any depth; none: the Kaggle data set's
    images: Path | None = setting(None, free=True)
    # your own captions of these images, in any usual kind of file, or a data set on the hub; none: made from labels
    captions: Path | None = setting(None, free=True)
    group_column: str | None = None  # column of --captions whose groups are not split; none: rides, or each image
    limit: int | None = None  # use at most this many frames; none: all
    train_share: float = 0.6  # share of the frames for training; whole rides only
    val_share: float = 0.28  # share of the frames for validation; what is left is the test split
    # the test split: a share of the rides, or with --subset train all val labels
    held_out: Literal["rides", "val"] = setting("rides", unlisted=True)

    def __post_init__(self):
        if self.captions and not self.images and (self.captions.is_file() or self.captions.suffix in CAPTION_FILES):
            raise UserError(f"--captions {self.captions}: give the folder with the images too, with --images")
        if self.group_column and not self.captions:
            raise UserError("--group-column: goes with --captions, whose column it names")
        if self.limit is not None and self.limit < 3:
            raise UserError(f"--limit {self.limit}: must be 3 or more, for train, validation and test")
        if not (0 < self.train_share < 1 and 0 < self.val_share < 1 and self.train_share + self.val_share < 1):
            raise UserError(
                f"--train-share {self.train_share} --val-share {self.val_share}: each must be between 0 and 1, "
                "and their sum less than 1, so that frames are left to test on"
            )


@dataclass(frozen=True)
class ModelSettings:
    """The model that is fine-tuned."""

    # BLIP-2 checkpoint: name or name@revision on the hub, or a local folder
    model: str = setting(BASE_MODEL, unlisted=True)
    load_in_4bit: bool = True  # quantise the frozen weights to NF4 with double quantisation
    image_size: int | None = None  # pixels a side, a multiple of 14 for BLIP-2; none: the checkpoint's, 224

    def __post_init__(self):
        check(self, "more than 0", lambda value: value > 0, "image_size")


@dataclass(frozen=True)
class LoraSettings:
    """The weights that are learnt."""

    lora_target: Literal["qformer", "lm", "both"] = "both"  # where LoRA is added: Q-Former, language model, both
    lora_rank: int = 16  # rank of the LoRA matrices
    lora_alpha: int = 32  # LoRA scale, divided by the rank
    lora_dropout: float = 0.05  # share of LoRA inputs dropped in training

    def __post_init__(self):
        check(self, "more than 0", lambda value: value > 0, "lora_rank", "lora_alpha")
        check(self, "0 or more, and less than 1", lambda value: 0 <= value < 1, "lora_dropout")


@dataclass(frozen=True)
class TrainingSettings:
    """How they are learnt."""

    num_train_epochs: float = 5.0  # passes over the training frames
    max_steps: int = -1  # optimiser steps, overrides the epochs; -1: by epochs
    train_batch_size: int = 16  # frames an optimiser step, over all devices
    per_device_train_batch_size: int | None = None  # frames a forward pass on each device; none: the most that fit
    per_device_eval_batch_size: int | None = None  # frames a validation pass; none: 64 in the fast way, else 16
    learning_rate: float = 5e-5  # peak of the linear schedule
    weight_decay: float = 0.01  # AdamW's
    warmup_ratio: float = 0.1  # share of the steps in which the learning rate rises
    max_caption_tokens: int = 256  # a longer caption is cut to this many tokens before its end token
    gradient_checkpointing: bool = False  # recompute activations: less memory, slower
    length_window: int = 50  # steps among which frames are dealt out by length, against padding; 0: random order
    # processes that decode images; 0: the main process
    dataloader_workers: int = setting(4, free=True, unlisted=True)
    seed: int = 42  # of the split, LoRA's start, dropout and the order of frames

    def __post_init__(self):
        check(self, "more than 0", lambda value: value > 0, "num_train_epochs", "train_batch_size", "learning_rate")
        check(self, "more than 0", lambda value: value > 0, "per_device_eval_batch_size", "max_caption_tokens")
        check(self, "more than 0, or -1", lambda value: value > 0 or value == -1, "max_steps")
        check(self, "0 or more", lambda value: value >= 0, "weight_decay", "length_window", "dataloader_workers")
        check(self, "0 or more, and less than 1", lambda value: 0 <= value < 1, "warmup_ratio")
        check(self, "0 to 4294967295", lambda value: 0 <= value < 2**32, "seed")
        micro = self.per_device_train_batch_size
        if micro is not None and (micro < 1 or self.train_batch_size % micro):
            raise UserError(
                f"--per-device-train-batch-size {micro}: must divide --train-batch-size {self.train_batch_size}"
            )


@dataclass(frozen=True)
class FastSettings:
    """What makes it faster. All of it is in captioner/fast; off: as if that folder were not there."""

    # auto: on a GPU, where it is possible; on: on a CPU too, and refused where it is not possible
    fast: Literal["auto", "on", "off"] = "auto"
    # folder of the frozen ViT's outputs, which main.py keeps; auto: with a GPU, beside the adapter's or a temporary one
    features: Literal["auto", "off"] | Path = setting("auto", free=True)


@dataclass(frozen=True)
class FastTrainingSettings(FastSettings):
    """What makes training faster. All of it is in captioner/fast; off: as if that folder were not there."""

    # GiB that they may take; none: half of what is free there
    features_disk_gib: float | None = setting(None, free=True, unlisted=True)

    def __post_init__(self):
        check(self, "0 or more", lambda value: value >= 0, "features_disk_gib")


@dataclass(frozen=True)
class RunSettings:
    """Where the run writes, how it goes on, and what it shows of itself."""

    output: Path = setting(Path("blip2-finetuned"), free=True)  # folder of the adapter, processor, settings and split
    # go on with the unfinished run in the output folder; the same adapter comes out
    resume: bool = setting(False, free=True, unlisted=True)
    overwrite: bool = setting(False, free=True, unlisted=True)  # train anew where an unfinished run is
    # minutes between two checkpoints within an epoch
    save_minutes: float = setting(10.0, free=True, unlisted=True)
    # also write <output>-merged: the model with the adapter merged in, unquantised
    merge: bool = setting(False, free=True, unlisted=True)
    # name of a private repository on the Hugging Face hub to upload the adapter to
    push_to_hub: str | None = setting(None, free=True, unlisted=True)
    # name of a private data set on the hub to upload the captions and their split to, without images
    push_captions: str | None = setting(None, free=True, unlisted=True)
    logging_steps: int = setting(10, free=True, unlisted=True)  # optimiser steps between two logged losses
    # validation images captioned and scored after each epoch; 0: none
    val_captions: int = setting(16, free=True, unlisted=True)
    # name of the folder in logs/ and of the wandb run; none: date and time
    run_name: str | None = setting(None, free=True, unlisted=True)
    # auto: online if logged in, else disabled
    wandb: Literal["auto", "online", "offline", "disabled"] = setting("auto", free=True, unlisted=True)

    def __post_init__(self):
        check(self, "0 or more", lambda value: value >= 0, "save_minutes", "val_captions")
        check(self, "more than 0", lambda value: value > 0, "logging_steps")
        if self.resume and self.overwrite:
            raise UserError("--resume --overwrite: go on with the unfinished run, or train anew, not both")


@dataclass(frozen=True)
class ReadingSettings:
    """How --labels are read. None: as for the captions that the model was trained on, by its run's record."""

    # person (2018) or pedestrian (det20); file: as labelled
    class_names: Literal["file", "2018", "det20"] | None = None
    lanes: bool | None = None  # count lanes and drivable areas like objects
    merge_duplicates: bool | None = None  # count boxes of one class that overlap by IoU > 0.85 once
    min_box_size: float | None = None  # pixels of its shorter side below which a box is not counted
    without_scene: Literal["skip", "caption"] | None = None  # frames with no scene attributes; caption: score them too

    def __post_init__(self):
        check(self, "0 or more", lambda value: value >= 0, "min_box_size")


@dataclass(frozen=True)
class GenerationSettings:
    """How captions are generated."""

    # take the likeliest token each time instead of sampling; --images alone does, unless it is told how to sample
    greedy: bool = False
    temperature: float = 0.7  # of sampling
    top_p: float = 0.9  # share of the probability that sampling draws from
    max_new_tokens: int | None = None  # longest caption in tokens; none: as saved in training
    batch_size: int | None = None  # images captioned at once; none: up to 512 in the fast way, 16 otherwise
    seed: int = 42  # of the sample and of sampling

    def __post_init__(self):
        check(self, "more than 0", lambda value: value > 0, "temperature", "batch_size")
        check(self, "more than 0, and at most 1", lambda value: 0 < value <= 1, "top_p")
        check(self, "1 or more", lambda value: value >= 1, "max_new_tokens")
        if self.greedy and (self.temperature, self.top_p) != (GenerationSettings.temperature, GenerationSettings.top_p):
            raise UserError("--greedy: takes no --temperature and no --top-p, as the likeliest token is not drawn")
        check(self, "0 to 4294967295", lambda value: 0 <= value < 2**32, "seed")


# --------------------------------------------------------------------------------------------------------------
# scripts


@dataclass(frozen=True)
class PipelineConfig:
    """Turn BDD100K labels into captions, a CSV of name,raw_caption."""

    demo: bool = False  # use the drawn scenes that ship with the project
    census: bool = False  # print what the labels hold, and draw it
    output: Path = Path("bdd100k_captions.csv")  # CSV file to write
    run_name: str | None = None  # name of the folder in logs/ for the census; none: date and time

    source: SourceSettings = SourceSettings()


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune BLIP-2 with QLoRA on captions, made from BDD100K labels or your own."""

    # use the drawn scenes and the small model that ship with the project: CPU, no network
    demo: bool = setting(False, unlisted=True)
    # go through every stage once and say what the whole run will take; nothing is kept
    check: bool = setting(False, free=True, unlisted=True)

    source: SourceSettings = SourceSettings()
    data: DataSettings = DataSettings()
    base: ModelSettings = ModelSettings()
    lora: LoraSettings = LoraSettings()
    training: TrainingSettings = TrainingSettings()
    run: RunSettings = RunSettings()
    fast: FastTrainingSettings = FastTrainingSettings()

    def __post_init__(self):
        if self.data.captions and self.source.labels:
            raise UserError(
                "--captions --labels: captions are read, or made from labels, not both; to keep what labels give, use "
                "python bdd100k_data_pipeline.py --output FILE"
            )
        given = self.source.labels or self.data.captions or self.demo
        if self.data.held_out == "val" and (self.source.subset != "train" or given):
            raise UserError("--held-out val: goes with --subset train of the Kaggle set, whose val labels it takes")
        of_labels = [name for name, value in asdict(SourceSettings()).items() if getattr(self.source, name) != value]
        if self.data.captions and of_labels:
            flag = f"--{of_labels[0].replace('_', '-')}"
            raise UserError(f"--captions {flag}: captions are read as they are; {flag} is for those made from labels")


@dataclass(frozen=True)
class EvalConfig:
    """Caption test images with the fine-tuned model and score the captions; or caption any images."""

    demo: bool = False  # evaluate what `main.py --demo` trained
    adapter: Path = Path("blip2-finetuned")  # folder that main.py wrote
    model: str | None = None  # folder or name of the base model, if it is not where main.py had it
    predictions: Path | None = None  # score this file of name, prediction, references (JSON lines or CSV), no model
    # references of --predictions: captions in any form that main.py reads, or predictions that have references
    references: Path | None = None
    labels: tuple[Path, ...] = ()  # label files whose facts the captions are held against; none: as in the references
    compare: tuple[Path, ...] = ()  # two predictions files: how they differ, and whether by chance
    against: tuple[Path, ...] = ()  # with --compare: the other model's files, where each has one for each of its seeds
    images: tuple[Path, ...] = ()  # caption these images or folders; with --predictions: show them in the report
    images_root: Path | None = None  # folder with the split's images if they were moved; none: where they were
    model_floors: bool = False  # score the untuned model and the nearest training image's caption as floors too
    base: bool = False  # caption with the model as it was before fine-tuning, the adapter left out
    blank: bool = False  # show black images instead: what scores then is said without looking
    split: Literal["train", "val", "test"] = "test"  # frames to draw the sample from
    num_samples: int | Literal["all"] = 20  # random frames to caption
    show: int = 3  # captions printed beside their references
    run_name: str | None = None  # name of the folder in logs/; none: date and time

    reading: ReadingSettings = ReadingSettings()
    generation: GenerationSettings = GenerationSettings()
    fast: FastSettings = FastSettings()

    def __post_init__(self):
        if self.num_samples != "all" and self.num_samples < 1:
            raise UserError(f"--num-samples {self.num_samples}: must be 1 or more, or the word all")
        check(self, "0 or more", lambda value: value >= 0, "show")
        if self.model_floors and self.base:
            raise UserError("--model-floors: needs the fine-tuned model, so it does not go with --base")
        if len(self.compare) != 2 and bool(self.compare) != bool(self.against):
            raise UserError(
                "--compare: takes two predictions files, or those of one model with the other's in --against"
            )
        if not self.labels and self.reading != ReadingSettings():
            raise UserError("--labels: is missing; class names, lanes and so on say how label files are read")
        if self.references and not (self.predictions or self.compare):
            raise UserError("--references: goes with --predictions or --compare, whose captions they belong to")
        if mode := next((name for name in IDLE if getattr(self, name)), None):
            self._refuse_idle(mode)

    def _refuse_idle(self, mode: str) -> None:
        """Raise UserError for a setting that has no effect beside the flag `mode`, and has not its usual value."""
        what_happens, idle = IDLE[mode]
        values, usual = flatten(self), flatten(make_default(EvalConfig, self.demo))
        for name in idle:
            if values[name] not in (usual[name], "all"):  # which --num-samples may be: so it is
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"--{mode} {flag}: {what_happens}, so {flag} has no effect; leave it out")
        if mode == "images" and values["greedy"] and values["seed"] != usual["seed"]:
            raise UserError("--images --seed: the likeliest tokens are taken, and none is drawn; add --no-greedy")


CAPTIONING = (  # settings of eval.py that have no effect where it captions nothing
    *("model", "base", "blank", "model_floors", "split", "images_root", "num_samples"),
    *(field.name for field in (*fields(GenerationSettings), *fields(FastSettings))),
)
IDLE = {  # by what eval.py is asked for, the first that is: what it does, and settings that have no effect on that
    "compare": ("files are compared", ("predictions", "adapter", "labels", "images", "show", *CAPTIONING)),
    "predictions": ("the captions of a file are scored", CAPTIONING),
    "images": (
        "all of them are captioned, and nothing is scored",
        ("labels", "model_floors", "split", "images_root", "num_samples"),
    ),
}


# What --demo changes; flags on the command line come on top.
DEMO: dict[type, dict[str, Any]] = {
    PipelineConfig: {"output": DEMO_DATA / "bdd100k_captions.csv"},
    TrainConfig: {
        "output": Path("blip2-finetuned-demo"),
        "model": str(DEMO_FOLDER / "base"),
        "lora_target": "lm",  # the base sees these scenes well: only the wording is to be learnt, in a minute
        "lora_dropout": 0.0,
        "train_batch_size": 4,
        "per_device_eval_batch_size": 50,
        "learning_rate": 3e-3,
        "warmup_ratio": 0.03,
        "logging_steps": 25,
        "features": DEMO_DATA / "features",
        "length_window": 0,
        "dataloader_workers": 0,
        "train_share": 800 / DEMO_SCENES,
        "val_share": 80 / DEMO_SCENES,
    },
    EvalConfig: {
        "adapter": Path("blip2-finetuned-demo"),
        "features": DEMO_DATA / "features",
        "num_samples": 200,
        "greedy": True,
        "batch_size": 100,
        "fast": "on",
    },
}


def make_default(config_class: type[Config], demo: bool) -> Config:
    """The configuration of a command line without flags, or with --demo alone, which is not noted in it."""
    return make_config(config_class, **(DEMO[config_class] if demo else {}))


def parse_args(config_class: type[Config], args: list[str] | None = None) -> Config:
    """Read `args` (default: the command line). A wrong flag prints what it may have meant and exits with 2."""
    args = sys.argv[1:] if args is None else args
    defaults = {**DEMO[config_class], "demo": True} if "--demo" in args else {}
    given = {word.partition("=")[0].replace("_", "-") for word in args}
    if given & {"--temperature", "--top-p"} and not given & {"--compare", "--predictions"}:
        defaults.pop("greedy", None)
    elif config_class is EvalConfig and "--images" in given and "--predictions" not in given:
        defaults["greedy"] = True  # as load_captioner captions: one image gets one caption
    return read_flags(make_config(config_class, **defaults), args)
