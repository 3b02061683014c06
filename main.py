"""Fine-tune BLIP-2 with QLoRA on BDD100K captions.

    python main.py                                                  # Kaggle data, BLIP-2 from the hub, one GPU
    python main.py --demo                                           # drawn scenes, small model, CPU
    python main.py --labels LABELS.json --images FOLDER --model FOLDER

Labels become captions, captions and pictures a train, a validation and a test split with no ride in two of them;
LoRA is trained on the NF4 model with the Hugging Face Trainer; the adapter with the best validation loss is saved
with its processor, generation settings, configuration and split, for eval.py or plain peft.
"""

import gc

from captioner.fast import compile_kernels
from config import TrainConfig, import_bitsandbytes, parse_args, run_script

if __name__ == "__main__":
    config = parse_args(TrainConfig)  # before the heavy imports, so that --help answers at once
    compiling = compile_kernels.start(config)
    gc.disable()  # until run_script, for a fifth of the time that imports take
import_bitsandbytes()  # before transformers and peft do

import csv
import functools
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import netrc
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from captioner.blip2.loading import (
    CaptionCollator,
    CaptionDataset,
    PackedCollator,
    add_lora,
    check_model,
    end_token,
    load_model,
    load_processor,
    make_generation_config,
    pick_device,
    pick_dtype,
    read_run,
)
from captioner.data.captions import (
    DEMO_IMAGES,
    SPLIT_COLUMNS,
    Example,
    atomic_write,
    caption_labels,
    find_labels,
    index_images,
    lock_folder,
    match_images,
    read_captions,
    ride_of,
    split_by_ride,
)
from captioner.data.images import LOADER_ERRORS, check_pictures, explain_dead_worker
from captioner.fast import caption_loss
from captioner.fast.layers import draws_by_kernels, get_blip2
from captioner.fast.speed import FastStep, has_room_to_unpack, join_weights, unpack_nf4
from captioner.fast.vision_store import (
    compute_outputs,
    find_folder,
    fits_memory,
    has_outputs,
    open_store,
    record_vision,
    start_reading,
    take_vision_out,
)
from captioner.publishing.model_card import merge_adapter, push_to_hub, write_model_card
from captioner.training.checkpoints import (
    checkpoint_folder,
    find_checkpoint,
    find_unfinished,
    fingerprint_data,
    list_changes,
    read_state,
    read_step,
    refuse_changes,
    write_state,
)
from captioner.training.dashboard import RunLog, ValidationCaptions, start_wandb
from captioner.training.trainer import (
    CaptionTrainer,
    Pace,
    RowCollator,
    Stopped,
    check_pickles,
    find_micro_batch,
    gather,
    gather_trainable,
    list_micro_batches,
)
from config import UserError, config_to_json, is_sharded, name_run

TRAINED_ON = ("train", "val")  # splits whose pictures training sees
SPARE_TOKENS = 16  # that generation may write beyond the longest training caption
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")  # whose versions a run records
WAITING = 6 * 3600  # seconds that processes wait for the first, which may have a data set to fetch
MAX_UNREADABLE = 0.05  # share of the pictures that may be unreadable
LISTED = 10  # of them that are listed
EVAL_BATCH, LEAN_EVAL_BATCH = 64, 16  # frames a validation pass, unless the user says how many
FINISHED = ".checkpoints-of-a-finished-run"

T = TypeVar("T")


# --------------------------------------------------------------------------------------------------------------
# data


def prepare_splits(config: TrainConfig, run_dir: Path) -> dict[str, list[Example]]:
    """Labels -> captions CSV -> examples with pictures -> {split: examples}."""
    labels = find_labels(config)
    images = index_images(find_images(config))
    shares = {"train": config.train_share, "val": config.val_share}
    held_out: list[Example] = []
    if config.held_out == "val":
        held_out = caption_held_out(config, images, run_dir)
        shares = {split: share / sum(shares.values()) for split, share in shares.items()}
    else:
        shares["test"] = 1 - sum(shares.values())
    caption_labels(config, labels, config.captions, run_dir)
    examples = match_images(read_captions(config.captions), images)
    rides = {ride_of(example.name) for example in held_out}
    by_name = {example.name: example for example in examples if ride_of(example.name) not in rides}
    if len(by_name) < len(examples):
        print(f"{len(examples) - len(by_name):,} frames are of rides that are held out, and are left out")
    names = split_by_ride(list(by_name)[: config.limit], shares, config.seed)
    splits = {split: [by_name[name] for name in names[split]] for split in names}
    splits.setdefault("test", held_out)
    return splits


def caption_held_out(config: TrainConfig, images: dict[str, Path], run_dir: Path) -> list[Example]:
    """The examples of Kaggle's val labels, all of them the test split."""
    from captioner.bdd100k.download import fetch_labels  # here: kagglehub takes a while to import

    captions = config.captions.with_stem(config.captions.stem + "_val")
    caption_labels(config, fetch_labels(config.kaggle_dataset, "val"), captions, run_dir / "held_out")
    return match_images(read_captions(captions), images)


def find_images(config: TrainConfig) -> Path:
    if config.images is not None:
        return config.images
    if config.labels:
        raise UserError("--labels without --images: give the folder with the pictures too")
    if config.demo:
        return DEMO_IMAGES
    from captioner.bdd100k.download import fetch_images  # here: kagglehub takes a while to import

    return fetch_images(config.kaggle_dataset)


def list_images(splits: dict[str, list[Example]], names: Iterable[str]) -> list[Path]:
    """The pictures of the splits of those names, in their order."""
    return [example.image for name in names for example in splits[name]]


def leave_out_unreadable(splits: dict[str, list[Example]], unreadable: dict[Path, str]) -> dict[str, list[Example]]:
    """The splits without the `unreadable` pictures {path: why}, which are counted and listed.

    Raises UserError when they are more than MAX_UNREADABLE of all.
    """
    everything = list(itertools.chain.from_iterable(splits.values()))
    if unreadable:
        listed = [unreadable[example.image] for example in everything if example.image in unreadable][:LISTED]
        reasons = "\n".join(f"  {reason}" for reason in listed)
        told = f"{len(unreadable):,} of {len(everything):,} pictures can't be read"
        if len(unreadable) > MAX_UNREADABLE * len(everything):
            first = reasons.splitlines()[0].strip()
            raise UserError(f"{told}, more than {MAX_UNREADABLE:.0%}: is the data set complete? The first: {first}")
        print(f"{told} and are left out:\n{reasons}")
    readable = {
        split: [example for example in examples if example.image not in unreadable]
        for split, examples in splits.items()
    }
    print(", ".join(f"{len(examples):,} {split}" for split, examples in readable.items()) + " frames, split by ride")
    return readable


# --------------------------------------------------------------------------------------------------------------
# training


def make_arguments(config: TrainConfig, device: torch.device) -> TrainingArguments:
    """The Trainer's settings, but for the frames a pass (see set_micro_batch and EVAL_BATCH)."""
    dtype = pick_dtype(device)
    arguments = TrainingArguments(
        output_dir=str(checkpoint_folder(config.output)),
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        **(checkpoint_activations() if config.gradient_checkpointing else {}),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_ratio,  # below 1 it is a share of all steps
        lr_scheduler_type="linear",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        seed=config.seed,
        eval_strategy="epoch",
        save_strategy="epoch",  # and within epochs, see trainer.Pace
        save_total_limit=None,  # see checkpoints.remove_old_checkpoints
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a NaN must show
        prediction_loss_only=True,
        remove_unused_columns=False,  # the dataset's columns become model inputs in the collator
        label_names=["labels"],
        dataloader_num_workers=config.dataloader_workers,
        dataloader_persistent_workers=False,  # they would take their seed once, and a run that goes on again
        dataloader_pin_memory=device.type == "cuda",
        accelerator_config={"non_blocking": device.type == "cuda"},
        ddp_find_unused_parameters=False,
        ddp_timeout=WAITING,
        average_tokens_across_devices=True,  # a loss is divided by the tokens of the step in all processes
        report_to="none",  # see dashboard.RunLog
    )
    if "LOCAL_RANK" not in os.environ and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # without a launcher Trainer would multiply the batch by the GPUs, and use one
    return arguments


def checkpoint_activations() -> dict:
    """TrainingArguments that recompute activations, under the name that the installed transformers has for them."""
    known = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def set_micro_batch(arguments: TrainingArguments, micro_batch: int, batch_size: int) -> None:
    """Make `batch_size` frames an optimiser step of passes of `micro_batch` frames on each device."""
    arguments.per_device_train_batch_size = micro_batch
    arguments.gradient_accumulation_steps = batch_size // (micro_batch * arguments.world_size)


def split_batch(config: TrainConfig, world_size: int) -> int:
    """Frames that each device takes of an optimiser step."""
    share, rest = divmod(config.train_batch_size, world_size)
    micro = config.per_device_train_batch_size
    if rest or (micro and share % micro):
        raise UserError(
            f"--train-batch-size {config.train_batch_size}: must be a multiple of the {world_size} processes"
            + (f" times --per-device-train-batch-size {micro}" if micro else "")
        )
    return share


def check_sharding(config: TrainConfig) -> None:
    """Raise UserError for what does not go with weights that are spread over the GPUs."""
    if config.load_in_4bit:
        raise UserError("--load-in-4bit: FSDP can't spread NF4 weights; give --no-load-in-4bit, or leave FSDP out")
    if config.val_captions:
        raise UserError(
            f"--val-captions {config.val_captions}: with FSDP no process has the whole model to caption with; give "
            "--val-captions 0, and caption with eval.py after training"
        )


def use_fast_step(config: TrainConfig, model, device: torch.device) -> bool:
    """Whether the fast step (see speed.py) is wanted and possible."""
    if config.fast_step == "off":
        return False
    obstacle = (
        "weights that FSDP spreads over the GPUs"
        if is_sharded()
        else "a GPU without bf16"
        if pick_dtype(device) == torch.float16
        else "a language model of another form than OPT-2.7B's"
        if not caption_loss.supports(model)
        else None
    )
    if config.fast_step == "on" and obstacle:
        raise UserError(f"--fast-step on: not made for {obstacle}; use --fast-step auto")
    return config.fast_step == "on" or (device.type == "cuda" and not obstacle)


def keep_outputs(config, arguments, model_config, splits: dict[str, list[Example]], device: torch.device) -> bool:
    """Whether memory has room for the ViT's outputs of what is trained on, in each process."""
    pictures = len(list_images(splits, TRAINED_ON))
    vision, dtype = model_config.vision_config, pick_dtype(device)
    return all(
        gather(
            fits_memory(vision, dtype, pictures, config.vision_store_gib, device.type == "cuda"), arguments.world_size
        )
    )


def make_datasets(
    config: TrainConfig, splits: dict[str, list[Example]], processor, model_config, outputs: torch.Tensor | None
) -> dict[str, CaptionDataset]:
    """What is trained on, with the ViT's `outputs` (N, P, D) of all its pictures in order, if they are stored."""
    datasets, start = {}, 0
    for split in TRAINED_ON:
        dataset = CaptionDataset(splits[split], processor, config.max_caption_tokens, end_token(model_config))
        if outputs is not None:
            dataset.features = outputs[start : start + len(dataset)]
        datasets[split], start = dataset, start + len(dataset)
    return datasets


def choose_wandb_mode(wandb: str) -> str:
    """The mode that wandb is to run in; it is never left to ask for a login."""
    if wandb == "auto":
        wandb = os.environ.get("WANDB_MODE") or ("online" if is_logged_in_to_wandb() else "disabled")
    if wandb == "online" and not is_logged_in_to_wandb():
        raise UserError("--wandb online: not logged in; run wandb login, set WANDB_API_KEY, or use --wandb offline")
    os.environ["WANDB_MODE"] = wandb
    os.environ.setdefault("WANDB_PROJECT", "blip2-bdd100k")
    return wandb


def is_logged_in_to_wandb() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def train_lora(
    config, arguments, state, model, datasets, make_callbacks, make_fast_step
) -> tuple[CaptionTrainer, dict]:
    """Train to the end, from the newest intact checkpoint on if there is one. Returns the Trainer and its metrics.

    When the GPU's memory does not suffice, the micro-batch is halved and the effective batch kept.
    """
    folder = checkpoint_folder(config.output)
    features = datasets["train"].features
    start = {name: weight.detach().cpu().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    while True:
        share(arguments, functools.partial(write_state, folder, state))
        checkpoint = share(arguments, functools.partial(find_checkpoint, folder))
        if checkpoint:
            check_pickles(checkpoint)
        done, steps = read_step(checkpoint) if checkpoint else (0, None)
        set_micro_batch(arguments, state["micro_batch"], config.train_batch_size)
        fast_step = make_fast_step()
        collator = (CaptionCollator if fast_step is None else PackedCollator)(model.config)
        trainer = CaptionTrainer(
            model=model,
            args=arguments,
            train_dataset=datasets["train"],
            eval_dataset=datasets["val"],
            data_collator=RowCollator(collator, pin=features is not None and features.is_cuda),
            fast_step=fast_step,
            length_window=config.length_window,
        )
        for callback in make_callbacks(done):
            trainer.add_callback(callback)
        if checkpoint:
            print(f"goes on after step {done:,} of {steps:,}, from {checkpoint}")
        if done and done == steps:  # only the saving was left to do
            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            trainer._load_best_model()
            return trainer, {}
        batches = math.ceil(len(datasets["train"]) / (state["micro_batch"] * arguments.world_size))
        steps_per_epoch = math.ceil(batches / arguments.gradient_accumulation_steps)
        try:
            with Pace(config.save_minutes, steps_per_epoch, arguments.world_size) as trainer.pace:
                trainer.add_callback(trainer.pace)
                return trainer, trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
        except Stopped:
            command = " ".join(["python main.py", *(flag for flag in sys.argv[1:] if flag != "--resume"), "--resume"])
            print(
                f"saved after step {trainer.state.global_step:,} of {trainer.state.max_steps:,}; go on with\n{command}"
            )
            sys.exit(128 + trainer.pace.signal if trainer.pace.signal else 0)
        except LOADER_ERRORS as error:
            if not isinstance(error, torch.OutOfMemoryError):
                raise (explain_dead_worker(error) or error) from None
            reason = str(error).splitlines()[0]
        smaller = [size for size in list_micro_batches(state["micro_batch"]) if size <= state["micro_batch"] // 2]
        if not smaller or arguments.world_size > 1:
            raise UserError(
                f"out of GPU memory with {state['micro_batch']} frames a forward pass ({reason}); take a smaller "
                "--per-device-train-batch-size or --per-device-eval-batch-size, or --gradient-checkpointing"
            )
        state["micro_batch"] = smaller[0]
        arguments.per_device_eval_batch_size = max(1, arguments.per_device_eval_batch_size // 2)
        print(f"out of GPU memory: from here on {smaller[0]} frames a forward pass, {config.train_batch_size} a step")
        del trainer
        gc.collect()
        torch.cuda.empty_cache()
        for name, weight in model.named_parameters():
            if name in start:
                weight.data.copy_(start[name])


def share(arguments: TrainingArguments, find: Callable[[], T]) -> T:
    """What `find` gives in the main process, in all processes."""
    found = [find() if arguments.process_index == 0 else None]
    if arguments.world_size > 1:
        broadcast_object_list(found)
    return found[0]


# --------------------------------------------------------------------------------------------------------------
# saving


def prepare_output(output: Path) -> None:
    """Raise UserError unless the output folder can be written, before hours of training."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / ".writable").touch()
        (output / ".writable").unlink()
        for left in (*output.glob(".saving.*"), *output.glob(".*.tmp"), output / FINISHED):  # of a killed process
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: can't be written ({error.strerror}); name another folder") from None


def save_finetuned(output: Path, model, weights, processor, generation, splits, run: dict) -> None:
    """Write everything that eval.py and plain peft need, under temporary names first; run.json comes last.

    `weights` are the adapter's, where the model has but a part of them; None: the model's own.
    """
    temporary = output / f".saving.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary, state_dict=weights)
        (temporary / "README.md").unlink(missing_ok=True)  # peft's empty model card
        processor.save_pretrained(temporary)
        generation.save_pretrained(temporary)
        write_splits(temporary / "split.csv", splits)
        for file in sorted(temporary.iterdir()):
            os.replace(file, output / file.name)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{output}: the adapter can't be saved ({error}); the checkpoints are kept: see to the disk, then go on "
            "with --resume, which has nothing left to train"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    (output / "scores.json").unlink(missing_ok=True)  # of an adapter that was here before
    with atomic_write(output / "run.json") as file:
        json.dump(run, file, indent=2)
    write_model_card(output)


def write_splits(path: Path, splits: dict[str, list[Example]]) -> None:
    with atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow(SPLIT_COLUMNS)
        for split, examples in splits.items():
            writer.writerows((e.name, split, e.image.resolve(), e.caption) for e in examples)


def describe_state(config: TrainConfig, world_size: int) -> dict:
    """What an unfinished run must have in common with the one that goes on with it, beside its data."""
    model = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
    return {
        "config": {**config_to_json(config), "model": model},
        "world": {"processes": world_size},
    }


def describe_run(state: dict, run_name: str, device: torch.device, results: dict) -> dict:
    """What is needed to tell later how an adapter came about."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "run_name": run_name,
        **state,
        "results": results,
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "git_commit": commit.stdout.strip() or None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def is_finished(config: TrainConfig) -> bool:
    """Whether a run with these settings has come to its end in the output folder."""
    if read_state(checkpoint_folder(config.output)) or not (config.output / "run.json").is_file():
        return False
    return not list_changes({"config": read_run(config.output)["config"]}, describe_state(config, 1) | {"world": {}})


def remove_checkpoints(output: Path) -> None:
    """At the end of a run; renamed first, so that what a kill leaves of them is not taken for an unfinished run."""
    if checkpoint_folder(output).exists():
        checkpoint_folder(output).rename(output / FINISHED)
        shutil.rmtree(output / FINISHED, ignore_errors=True)


def end_workers() -> None:
    """Kill processes that decode ahead for steps that don't come: the interpreter would wait for them."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report them as crashed
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)  # None: not one that Python set


def publish(config: TrainConfig) -> None:
    """What is made of the saved adapter: the merged model and the copy on the hub, where asked for."""
    if config.merge:
        merged = config.output.with_name(config.output.name + "-merged")
        merge_adapter(config.output, merged)
        print(f"merged model saved to {merged}")
    if config.push_to_hub:
        print(f"uploaded to {push_to_hub(config.output, config.push_to_hub)}")


def main(config: TrainConfig, compiling: subprocess.Popen | None = None) -> None:
    with lock_folder(config.output, "--output"):
        train(config, compiling)


def train(config: TrainConfig, compiling: subprocess.Popen | None) -> None:
    start = time.perf_counter()
    transformers_logging.set_verbosity_error()
    if config.resume and is_finished(config):
        print(f"the run in {config.output} is finished, nothing is left to train")
        publish(config)
        return
    if is_sharded():
        check_sharding(config)
    wandb_mode = choose_wandb_mode(config.wandb)
    device = pick_device()
    arguments = make_arguments(config, device)
    micro_batch_limit = split_batch(config, arguments.world_size)
    set_seed(config.seed)  # before LoRA draws its first weights
    model_config = check_model(config.model, config.load_in_4bit, device)  # before hours of download

    unfinished = None if config.overwrite else read_state(checkpoint_folder(config.output))
    run_dir = Path(unfinished["run_dir"]) if unfinished else share(arguments, functools.partial(name_run, config))
    splits = share(arguments, functools.partial(prepare_splits, config, run_dir))
    state = describe_state(config, arguments.world_size)
    unfinished = share(
        arguments, functools.partial(find_unfinished, config.output, state, config.resume, config.overwrite)
    )
    share(arguments, functools.partial(prepare_output, config.output))
    stored = keep_outputs(config, arguments, model_config, splits, device)
    for_eval = stored and find_folder(config, device) is not None  # eval.py finds the test split's outputs on disk
    decoded_later = (*TRAINED_ON, *["test"] * for_eval) if stored else ()  # for the ViT
    unchecked = list_images(splits, [split for split in splits if split not in decoded_later])
    unreadable = share(arguments, functools.partial(check_pictures, unchecked))
    if not stored:
        splits = leave_out_unreadable(splits, unreadable)  # before the model is fetched

    processor = load_processor(config.model)
    if stored:
        images = list_images(splits, TRAINED_ON)
        not_kept = list_images(splits, ["test"]) if for_eval and arguments.process_index == 0 else []
        wanted, ahead, folder = [*images, *not_kept], None, find_folder(config, device)
        if folder is None or not has_outputs(folder):  # they are decoded while the model is loaded
            side = model_config.vision_config.image_size
            how = {"hashes": folder is not None, "pin": device.type == "cuda"}
            ahead = start_reading(wanted, processor, pick_dtype(device), side, **how)
    model = load_model(config.model, config.load_in_4bit, device, checked=True)
    outputs, store = None, None
    if stored:
        store = open_store(config, model, processor, write=arguments.process_index == 0)
        vision = take_vision_out(model)
    model = add_lora(model, config.lora_target, config.lora_rank, config.lora_alpha, config.lora_dropout)
    fast = use_fast_step(config, model, device)
    if fast:
        if config.unpack_nf4 == "on" or (
            config.unpack_nf4 == "auto" and not config.gradient_checkpointing and has_room_to_unpack(model, device)
        ):
            print(f"NF4 values of {unpack_nf4(model)} layers are unpacked: more memory, fewer computations")
        join_weights(model)
    if stored:
        if fast and config.cuda_graphs and config.unpack_nf4 != "off":
            vision = record_vision(vision)
        settings = model.config.vision_config
        outputs, found = compute_outputs(vision, settings, processor, wanted, store, len(images), ahead)
        if store is not None:
            print(store.describe())
        del vision, ahead
        gc.collect()  # now, not when memory is short
        for reasons in gather(found, arguments.world_size):
            unreadable |= reasons
        splits = leave_out_unreadable(splits, unreadable)
        print("the frozen ViT's outputs are stored: it is not needed in training")
    if config.demo:
        torch.set_num_threads(1)  # of steps as small as the demo's, several threads mostly wait for each other
    state["data"] = fingerprint_data(splits)
    if unfinished:
        refuse_changes(config.output, unfinished, state)
    datasets = make_datasets(config, splits, processor, model.config, outputs)
    longest = max(map(len, datasets["train"].caption_ids))
    generation = make_generation_config(model.config, longest + SPARE_TOKENS)
    if outputs is not None:
        arguments.dataloader_num_workers = 0  # nothing left to decode
        arguments.dataloader_pin_memory &= not outputs.is_cuda  # or there already
    model.print_trainable_parameters()
    if fast:
        compile_kernels.finish(compiling)

    lean = not fast or config.gradient_checkpointing
    eval_batch = config.per_device_eval_batch_size or (LEAN_EVAL_BATCH if lean else EVAL_BATCH)
    arguments.per_device_eval_batch_size = eval_batch
    state["run_dir"] = str(run_dir)
    state["model_commit"] = getattr(model.config, "_commit_hash", None)  # that the hub's name stood for
    state["micro_batch"] = (unfinished or {}).get("micro_batch") or config.per_device_train_batch_size
    if state["micro_batch"] is None:
        fitting = find_micro_batch(model, datasets["train"], micro_batch_limit, device, pick_dtype(device), fast)
        state["micro_batch"] = min(gather(fitting, arguments.world_size))
    steps = micro_batch_limit // state["micro_batch"]
    print(f"{config.train_batch_size} frames an optimiser step: {state['micro_batch']} a forward pass, {steps} passes")
    is_main = arguments.process_index == 0
    wandb_run = start_wandb(wandb_mode, run_dir.name, state["config"]) if is_main else None

    def make_callbacks(done: int) -> list[TrainerCallback]:
        log = RunLog(run_dir, done, wandb_run)
        return (
            [ValidationCaptions(log, datasets["val"], config.val_captions, processor, generation), log]
            if is_main
            else []
        )

    def make_fast_step() -> FastStep | None:
        if not fast:
            return None
        graphs = config.cuda_graphs and device.type == "cuda"
        if config.gradient_checkpointing:  # which asks torch for its generator's state if that draws dropouts
            graphs = graphs and draws_by_kernels(get_blip2(model).query_tokens, [config.lora_rank])
        return FastStep(model, graphs)

    try:
        trainer, metrics = train_lora(config, arguments, state, model, datasets, make_callbacks, make_fast_step)
        if store is not None:
            store.close()
    finally:  # also when it was stopped, and in processes that have nothing to save
        end_workers()
        if store is not None:
            store.close(finish=False)
    weights = gather_trainable(model) if is_sharded() else None
    if not is_main:
        return
    results = {**metrics, "best_eval_loss": trainer.state.best_metric}
    if device.type == "cuda":
        results["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    run = describe_run(state, run_dir.name, device, results)
    save_finetuned(config.output, model, weights, processor, generation, splits, run)
    remove_checkpoints(config.output)
    print(f"best validation loss {trainer.state.best_metric:.4f}; curves in {run_dir / 'dashboard.png'}")
    print(f"adapter saved to {config.output} after {time.perf_counter() - start:.0f} s")
    publish(config)
    print("next: python eval.py" + (" --demo" if config.demo else f" --adapter {config.output}"))


if __name__ == "__main__":
    run_script(functools.partial(main, compiling=compiling), config)
