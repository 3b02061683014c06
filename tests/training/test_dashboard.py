"""What a run shows of itself: the curves."""

import json
from types import SimpleNamespace

import pytest
import torch

from captioner.blip2.generation import GreedyCaptioner
from captioner.data.examples import Example, tabulate_examples
from captioner.scoring import text_metrics
from captioner.training.dashboard import RunLog, ValidationCaptions, choose_panels, plot_dashboard


@pytest.mark.parametrize("by_facts", [True, False])
def test_each_panel_has_its_curves(figures, tmp_path, by_facts):
    panels = choose_panels([{"val_facts_f1": 0.5}] if by_facts else [])
    assert ("facts" in " ".join(panels)) == by_facts
    keys = [key for curves in panels.values() for key in curves]
    records = [{"step": step, **dict.fromkeys(keys, 1 / step)} for step in (1, 2, 3)]
    plot_dashboard(records, tmp_path / "dashboard.png")
    [figure] = figures
    for axis, (title, curves) in zip(figure.axes, panels.items(), strict=True):
        assert axis.get_title() == title
        assert len(axis.lines) == len(curves)
        labels = [text.get_text() for text in axis.get_legend().get_texts()] if axis.get_legend() else []
        assert labels == [label for label in curves.values() if label]
        assert all(line.get_xdata().tolist() == [1, 2, 3] for line in axis.lines)
    assert [axis.get_yscale() for axis in figure.axes] == ["log"] + ["linear"] * 5
    assert figure.axes[1].get_ylim() == (0, 1.02)  # shares
    assert [path.name for path in tmp_path.iterdir()] == ["dashboard.png"]


def test_a_panel_without_figures_is_empty(figures, tmp_path):
    plot_dashboard([], tmp_path / "dashboard.png")
    assert not any(axis.lines or axis.get_legend() for axis in figures[0].axes)


def test_curves_of_captions_say_of_how_many(figures, tmp_path):
    plot_dashboard(
        [{"step": 1, "val_facts_f1": 0.5, "val_BLEU-4": 0.5, "val_captions": 16}], tmp_path / "dashboard.png"
    )
    titles = [axis.get_title() for axis in figures[0].axes]
    assert [title for title in titles if "captions" in title] == [
        "right facts of validation captions (n = 16)",
        "BLEU-4 of validation captions (n = 16)",
    ]


GRAMMAR = "It is a night scene in clear weather on a highway road. There are 3 cars."


@pytest.mark.parametrize("free", [True, False])
def test_each_epoch_is_scored_by_what_its_references_say(figures, tmp_path, capsys, free):
    """In the records, on the console, in captions.md and in dashboard.png: facts everywhere or nowhere."""
    captions = [("A red car waits.", ("A car.", "One car stands still.")), ("Two people cross.", ("People walk.",))]
    captions = captions if free else [(GRAMMAR, ()), (GRAMMAR.replace("night", "daytime"), ())]
    examples = [Example(f"{n}.jpg", tmp_path, first, "", more) for n, (first, more) in enumerate(captions)]
    said = ["A car", "Two people cross."] if free else [GRAMMAR, GRAMMAR]
    log = RunLog(tmp_path)
    watch = ValidationCaptions(log, tabulate_examples(examples), 2, None)
    watch.generate = lambda model, batch_size: said
    state = SimpleNamespace(is_world_process_zero=True, global_step=5, epoch=1.0)
    watch.on_evaluate(SimpleNamespace(eval_batch_size=2), state, None)
    [record] = log.records
    printed, written = capsys.readouterr().out, (tmp_path / "captions.md").read_text()
    text = text_metrics.measure_texts([example.captions for example in examples], {"said": said})["said"]
    wanted = text_metrics.score(text["corpus_bleu"])
    if free:
        wanted |= text_metrics.score(text["cider_d"]) | text_metrics.score(text["rouge_l"])
        assert wanted["ROUGE-L"] > 0.9, "any of the references will do"
    assert {name: record[f"val_{name}"] for name in wanted} == wanted
    assert ("val_facts_f1" in record) == ("facts F1 0.875" in printed) == (not free)
    assert ("facts" in printed + json.dumps(record)) == (not free)
    assert ("CIDEr-D" in printed) == ("ROUGE-L" in printed) == free
    assert "cut off" not in written and written.count("- reference: ") == (5 if free else 2)
    plot_dashboard(log.records, tmp_path / "dashboard.png")
    titles = " ".join(axis.get_title() for axis in figures[0].axes)
    assert ("facts" in titles) == (not free) and "captions (n = 2)" in titles


@pytest.mark.parametrize("step", [0, 3])
def test_captions_of_an_earlier_run_of_the_name_go(tmp_path, step):
    (tmp_path / "captions.md").write_text("# after epoch 1")
    RunLog(tmp_path).on_train_begin(None, SimpleNamespace(global_step=step), None)
    assert (tmp_path / "captions.md").exists() == (step > 0)


@pytest.mark.parametrize("training", [True, False])
def test_captions_of_validation_images_leave_no_trace_in_training(training):
    """And the captioner gets ready once, before the first of them."""
    model, modes = torch.nn.Dropout(), []
    model.train(training)

    class Drawing(GreedyCaptioner):
        def prepare(self, model):
            modes.append("prepared")

        def __call__(self, model, pixels):
            modes.append(model.training)
            return [f"{value:g} {torch.rand(1).item():.0f}"[:1] for value in pixels]

        def finish(self):
            modes.append("finished")

    dataset = [{"pixel_values": torch.tensor(float(place))} for place in range(5)]
    torch.manual_seed(0)
    texts = ValidationCaptions(None, dataset, 5, Drawing(None, None)).generate(model, batch_size=2)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))
    assert texts == ["0", "1", "2", "3", "4"] and modes == ["prepared", *[False] * 3, "finished"]
    assert model.training == training


@pytest.mark.parametrize("main", [True, False])
def test_curves_are_drawn_after_a_validation_by_the_main_process(tmp_path, main):
    log = RunLog(tmp_path)
    state = SimpleNamespace(global_step=3, is_world_process_zero=main)
    log.on_evaluate(None, state, None)
    log.finish_drawing()
    assert (tmp_path / "dashboard.png").exists() == main and log.last[1] == 3
