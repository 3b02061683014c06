"""Fine-tune BLIP-2 with QLoRA on BDD100K captions.

    python main.py                                                  # Kaggle data, BLIP-2 from the hub, one GPU
    python main.py --demo                                           # drawn scenes, small model, CPU
    python main.py --labels LABELS.json --images FOLDER --model FOLDER

Labels become captions, captions and images a train, a validation and a test split with no ride in two of them;
LoRA is trained on the NF4 model with the Hugging Face Trainer; the adapter with the best validation loss is saved
with its processor, generation settings, configuration and split, for eval.py or plain peft.
"""

import gc

from captioner.fast import compile_kernels
from captioner.runtime.cli import import_bitsandbytes, run_script
from config import TrainConfig, parse_args

if __name__ == "__main__":
    config = parse_args(TrainConfig)  # before the heavy imports, so that --help answers at once
    compiling = compile_kernels.start(config)
    gc.disable()  # until run_script, for a fifth of the time that imports take
import_bitsandbytes()  # before transformers and peft do

import functools
import subprocess
import time
from pathlib import Path

import torch
from transformers import TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from captioner.blip2.batches import CaptionCollator, make_datasets
from captioner.blip2.captioning import make_generation_config
from captioner.blip2.loading import check_model, load_model, load_processor, pick_device, pick_dtype
from captioner.blip2.lora import add_lora
from captioner.blip2.vision import start_reading, take_vision_out
from captioner.data.reading import check_images
from captioner.data.splits import leave_out_unreadable, list_images, prepare_splits
from captioner.fast.captioning import FastGreedyCaptioner
from captioner.fast.features import INDEX, FeatureFile, choose_place, keep_features
from captioner.fast.speed import has_room_to_unpack, join_weights, unpack_nf4, use_fast_step
from captioner.fast.trainer import speed_up
from captioner.publishing.hub import push_to_hub
from captioner.publishing.merge import merge_adapter
from captioner.publishing.model_card import write_model_card
from captioner.runtime.errors import go_on_without
from captioner.runtime.files import lock_folder, name_run
from captioner.runtime.processes import ask_main, gather, go_on_alone, is_sharded
from captioner.training.arguments import check_sharding, make_arguments, split_batch
from captioner.training.checkpoints import (
    checkpoint_folder,
    find_unfinished,
    fingerprint_data,
    read_state,
    refuse_changes,
)
from captioner.training.dashboard import RunLog, ValidationCaptions, choose_wandb_mode, start_wandb
from captioner.training.micro_batch import compute_loss, find_micro_batch
from captioner.training.run import (
    describe_run,
    describe_state,
    end_workers,
    is_finished,
    prepare_output,
    remove_checkpoints,
    save_finetuned,
    train_lora,
)
from captioner.training.trainer import CaptionTrainer, RowCollator, gather_trainable

SPARE_TOKENS = 16  # that generation may write beyond the longest training caption
EVAL_BATCH, LEAN_EVAL_BATCH = 64, 16  # frames a validation pass, unless the user says how many


def publish(config: TrainConfig) -> None:
    """What is made of the saved adapter: its model card; the merged model and the copy on the hub, where asked for."""
    with go_on_without("model card"):
        write_model_card(config.output)
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
    if is_sharded():
        check_sharding(config)
    wandb_mode = choose_wandb_mode(config.wandb)
    device = pick_device()
    arguments = make_arguments(config, device)
    micro_batch_limit = split_batch(config, arguments.world_size)  # by now the processes are joined
    if config.resume and ask_main(is_finished, config):
        print(f"the run in {config.output} is finished, nothing is left to train")
        go_on_alone()
        publish(config)
        return
    set_seed(config.seed)  # before LoRA draws its first weights
    model_config = check_model(config.model, config.load_in_4bit, device)  # before hours of download

    unfinished = None if config.overwrite else ask_main(read_state, checkpoint_folder(config.output))
    run_dir = Path(unfinished["run_dir"]) if unfinished else ask_main(name_run, config)
    splits = ask_main(prepare_splits, config, run_dir)
    state = describe_state(config, arguments.world_size)
    unfinished = ask_main(find_unfinished, config.output, state, config.resume, config.overwrite)
    ask_main(prepare_output, config.output)
    images = list_images(splits, splits)
    vision_config, dtype = model_config.vision_config, pick_dtype(device)
    place = ask_main(choose_place, config, len(images), vision_config, dtype, device)
    if place is None:
        splits = leave_out_unreadable(splits, ask_main(check_images, images))  # before the model is fetched

    processor, reading = load_processor(config.model), None
    if place and not (place.folder / INDEX).exists():  # they are decoded while the model is loaded
        share = images[arguments.process_index :: arguments.world_size]
        reading = start_reading(share, processor, dtype, vision_config.image_size)
    model = load_model(config.model, config.load_in_4bit, device, checked=True)
    vision = take_vision_out(model) if place else None
    model = add_lora(model, config.lora_target, config.lora_rank, config.lora_alpha, config.lora_dropout)
    fast = use_fast_step(config, model, device)
    trainer_class, collator, loss = CaptionTrainer, CaptionCollator(model.config), compute_loss
    if fast:
        if config.unpack_nf4 == "on" or (
            config.unpack_nf4 == "auto" and not config.gradient_checkpointing and has_room_to_unpack(model, device)
        ):
            print(f"NF4 values of {unpack_nf4(model)} layers are unpacked: more memory, fewer computations")
        join_weights(model)
        trainer_class, collator, loss = speed_up(config, model)
    features = None
    if place:
        file = FeatureFile(place.folder, vision, model.config.vision_config, processor)
        features, unreadable = keep_features(file, place.limit, images, reading)
        splits = leave_out_unreadable(splits, unreadable)
        del vision, file, reading
        gc.collect()  # now, not when memory is short
    if config.demo:
        torch.set_num_threads(1)  # of steps as small as the demo's, several threads mostly wait for each other
    state["data"] = fingerprint_data(splits)
    if unfinished:
        refuse_changes(config.output, unfinished, state)
    datasets = make_datasets(config, splits, processor, model.config, features)
    longest = max(map(len, datasets["train"].caption_ids))
    generation = make_generation_config(model.config, longest + SPARE_TOKENS)
    if features is not None:
        arguments.dataloader_num_workers = 0  # nothing left to decode
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
        search = (find_micro_batch, model, datasets["train"], micro_batch_limit, collator, loss)
        state["micro_batch"] = min(gather(*search))
    steps = micro_batch_limit // state["micro_batch"]
    print(f"{config.train_batch_size} frames an optimiser step: {state['micro_batch']} a forward pass, {steps} passes")
    is_main = arguments.process_index == 0
    wandb_run = start_wandb(wandb_mode, run_dir.name, state["config"]) if is_main else None

    def make_callbacks(done: int) -> list[TrainerCallback]:
        if not is_main:
            return []
        log = RunLog(run_dir, done, wandb_run)
        count = min(config.val_captions, len(datasets["val"]))
        caption = FastGreedyCaptioner(processor, generation, count)
        return [ValidationCaptions(log, datasets["val"], count, caption), log]

    def make_trainer(done: int) -> CaptionTrainer:
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=datasets["train"],
            eval_dataset=datasets["val"],
            data_collator=RowCollator(collator),
            length_window=config.length_window,
        )
        for callback in make_callbacks(done):
            trainer.add_callback(callback)
        return trainer

    try:
        trainer, metrics = train_lora(config, arguments, state, model, make_trainer)
    finally:  # also when it was stopped, and in processes that have nothing to save
        end_workers()
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
