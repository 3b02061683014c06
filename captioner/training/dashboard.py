"""What a training run shows of itself, in logs/<run>/ and in wandb.

metrics.jsonl has a record for each logged step and each epoch, captions.md what the model said of a few validation
images after each epoch, dashboard.png the curves of it all.
"""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback

from captioner.bdd100k.parsing import read_caption
from captioner.blip2.generation import GreedyCaptioner
from captioner.data.examples import Example, list_examples
from captioner.runtime.errors import escape_controls, go_on_without
from captioner.runtime.files import atomic_write, explain_writing
from captioner.scoring.fact_metrics import measure_shares
from captioner.scoring.grammar import find_facts
from captioner.scoring.text_metrics import measure_texts, score, score_bleu
from captioner.training.run import Run
from captioner.training.tracking import start_wandb

REMEDY = "the checkpoints before are kept: see to the disk, then go on with --resume"
SHOWN = 2  # captions of each epoch that go to the console
WIDEST = 400  # characters of them
EPOCH_LINE = {  # what the console says of each epoch: {key: (name, decimals)}
    "facts_f1": ("facts F1", 3),
    "time_of_day": ("time", 2),
    "weather": ("weather", 2),
    "scene": ("scene", 2),
    "traffic_light": ("light", 2),
    "objects_f1": ("objects F1", 3),
    "CIDEr-D": ("CIDEr-D", 3),
    "BLEU-4": ("BLEU-4", 3),
    "ROUGE-L": ("ROUGE-L", 3),
    "METEOR": ("METEOR", 3),
}
FACT_PANELS = {  # title: {key of the records: its label}; the first has shares from 0 to 1
    "right facts of validation captions": {
        "val_facts_f1": "all, F1",
        "val_time_of_day": "time of day",
        "val_weather": "weather",
        "val_scene": "scene",
        "val_traffic_light": "light",
        "val_objects_f1": "objects, F1",
    },
    "BLEU-4 of validation captions": {"val_BLEU-4": None},
}
TEXT_PANELS = {  # of captions that are scored as text alone
    "text scores of validation captions": {"val_BLEU-4": "BLEU-4", "val_ROUGE-L": "ROUGE-L", "val_METEOR": "METEOR"},
    "CIDEr-D of validation captions": {"val_CIDEr-D": None},
}


class RunLog(TrainerCallback):
    """Keeps what the Trainer logs: each record at once as a JSON line and in wandb, the curves as an image.

    Of a run that goes on, the records up to its step are kept.
    """

    def __init__(self, run_dir: Path, wandb_run=None):
        self.run_dir, self.wandb_run = run_dir, wandb_run
        self.path = run_dir / "metrics.jsonl"
        self.records: list[dict] = []
        self.last = (time.perf_counter(), 0)  # when the speed was last logged, and the step then
        self.drawer, self.drawing = ThreadPoolExecutor(1), None  # half a second a time, beside training

    def on_train_begin(self, args, state, control, **kwargs):
        with explain_writing(self.run_dir, REMEDY):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            if not state.global_step:  # of an earlier run of this name
                (self.run_dir / "captions.md").unlink(missing_ok=True)
        self.records = read_records(self.path, state.global_step)
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(record) + "\n" for record in self.records)
        self.last = (time.perf_counter(), state.global_step)

    def add(self, record: dict) -> None:
        self.records.append(record)
        with explain_writing(self.path, REMEDY), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.wandb_run is not None:
            try:
                self.wandb_run.log({name: value for name, value in record.items() if name != "step"}, record["step"])
            except Exception as error:  # whatever goes wrong there must not end the training
                print(f"wandb fails from here on and is left alone: {error}")
                self.wandb_run = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        record = {"step": state.global_step, **logs}
        if "loss" in logs:
            now = time.perf_counter()
            samples = (state.global_step - self.last[1]) * args.train_batch_size * args.world_size
            samples *= args.gradient_accumulation_steps
            record["samples_per_second"] = samples / (now - self.last[0])
            if torch.cuda.is_available():
                record["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            self.last = (now, state.global_step)
        self.add(record)

    def on_evaluate(self, args, state, control, **kwargs):
        self.last = (time.perf_counter(), state.global_step)  # the speed is that of training
        if state.is_world_process_zero:
            self.draw()

    def on_save(self, args, state, control, **kwargs):
        self.last = (time.perf_counter(), state.global_step)  # without the checkpoint

    def draw(self) -> None:
        """Have a thread draw the curves so far."""
        self.finish_drawing()
        self.drawing = self.drawer.submit(plot_dashboard, list(self.records), self.run_dir / "dashboard.png")

    def finish_drawing(self) -> None:
        if self.drawing is not None:
            with go_on_without("curves in dashboard.png"):
                self.drawing.result()

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.draw()
            self.finish_drawing()
            if self.wandb_run is not None:
                with go_on_without("end of the wandb run"):
                    self.wandb_run.finish()


def read_records(path: Path, done: int) -> list[dict]:
    """The records of metrics.jsonl up to step `done`."""
    if not done or not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the process was killed as it wrote
        if record["step"] <= done:
            records.append(record)
    return records


class ValidationCaptions(TrainerCallback):
    """After each epoch: greedy captions of the first `count` validation images, and how right they are.

    They are scored on facts where find_facts finds any in the references, else as text alone.
    """

    def __init__(self, log: RunLog, dataset: Dataset, count: int, caption: GreedyCaptioner):
        self.log, self.dataset, self.count, self.caption = log, dataset, count, caption

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        if not self.count or not state.is_world_process_zero:
            return
        examples = list_examples(self.dataset, self.count)
        texts = self.generate(model, args.eval_batch_size)
        facts, scores = score_captions(texts, examples)
        record = {f"val_{name}": value for name, value in scores.items() if value == value}
        record["val_captions"] = self.count
        self.log.add({"step": state.global_step, "epoch": state.epoch, **record})
        self.write(state.epoch, examples, texts, of_grammar=facts)
        shown = [f"{title} {scores[name]:.{digits}f}" for name, (title, digits) in EPOCH_LINE.items() if name in scores]
        print(f"\nepoch {state.epoch:g}: {self.count} validation captions, {', '.join(shown)}")
        for example, text in list(zip(examples, texts, strict=True))[:SHOWN]:
            said = text if len(text) <= WIDEST else text[:WIDEST] + " ..."
            told = f"  {example.name}\n    said:      {said or '(nothing)'}"
            told += "".join(f"\n    reference: {caption}" for caption in example.captions)
            print(escape_controls(told))

    def generate(self, model, batch_size: int) -> list[str]:
        """Captions, without a trace in the random numbers that training goes on with."""
        was_training, texts = model.training, []
        model.eval()
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        try:
            with torch.random.fork_rng(devices):
                self.caption.prepare(model)
                for start in range(0, self.count, batch_size):
                    rows = [self.dataset[row] for row in range(start, min(start + batch_size, self.count))]
                    texts += self.caption(model, torch.stack([row["pixel_values"] for row in rows]))
        finally:
            self.caption.finish()
            model.train(was_training)
        return texts

    def write(self, epoch: float, examples: Sequence[Example], texts: list[str], of_grammar: bool) -> None:
        path = self.log.run_dir / "captions.md"
        with explain_writing(path, REMEDY), open(path, "a", encoding="utf-8") as file:
            file.write(f"# after epoch {epoch:g}\n\n")
            for example, text in zip(examples, texts, strict=True):
                cut = " (cut off)" if of_grammar and read_caption(text).cut_off else ""
                references = "".join(f"- reference: {caption}\n" for caption in example.captions)
                file.write(f"{example.name}{cut}\n- said: {text}\n{references}\n")


def score_captions(texts: Sequence[str], examples: Sequence[Example]) -> tuple[bool, dict[str, float]]:
    """Whether captions are scored on facts, and their scores by name: those of facts and BLEU, or of text alone."""
    references = [example.captions for example in examples]
    facts = find_facts([row[0] for row in references])
    if facts:
        return True, score(measure_shares(list(map(read_caption, texts)), facts)) | score_bleu(texts, references)
    scores: dict[str, float] = {}
    for group, metric in measure_texts(references, {"said": texts})["said"].items():
        scores |= score(metric) if group != "reference_bleu" else {}  # which has BLEU's names too
    return False, scores


def make_callbacks(run: Run, dataset: Dataset, caption: GreedyCaptioner) -> list[TrainerCallback]:
    """What the main process shows of the run; `caption` is for the first images of the validation dataset."""
    if not run.is_main:
        return []
    log = RunLog(run.folder, start_wandb(run.wandb_mode, run.folder.name, run.state["wandb_id"], run.state["config"]))
    return [ValidationCaptions(log, dataset, min(run.config.run.val_captions, len(dataset)), caption), log]


def choose_panels(records: list[dict]) -> dict[str, dict[str, str | None]]:
    """{title: {key of the records: its label}}, with scores of facts where the records have any, else of text alone."""
    by_facts = any("val_facts_f1" in record for record in records)
    return {
        "loss (nats a token)": {"loss": "training", "eval_loss": "validation"},
        **(FACT_PANELS if by_facts else TEXT_PANELS),
        "learning rate": {"learning_rate": None},
        "gradient norm": {"grad_norm": None},
        "samples a second": {"samples_per_second": None},
    }


def plot_dashboard(records: list[dict], path: Path) -> None:
    """Curves over the optimiser steps, as PNG."""
    from matplotlib.figure import Figure  # which, unlike pyplot, may be used by any thread

    figure = Figure(figsize=(15, 7))
    axes = figure.subplots(2, 3)
    figure.subplots_adjust(0.05, 0.08, 0.98, 0.94, wspace=0.2, hspace=0.35)  # a layout found anew takes as long again
    for axis, (title, curves) in zip(axes.flat, choose_panels(records).items(), strict=True):
        for key, label in curves.items():
            points = [(record["step"], record[key]) for record in records if key in record]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 20 else None, ms=3)
        counts = {record["val_captions"] for record in records if "val_captions" in record}
        said = f" (n = {max(counts)})" if counts and "captions" in title else ""
        axis.set(title=title + said, xlabel="optimiser step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize="small")
    if any("loss" in record for record in records):
        axes.flat[0].set_yscale("log")
    axes.flat[1].set_ylim(0, 1.02)
    with explain_writing(path, REMEDY):
        figure.savefig(path.with_suffix(".tmp.png"), dpi=110)
        path.with_suffix(".tmp.png").replace(path)
