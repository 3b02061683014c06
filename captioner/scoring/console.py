"""Scores, captions and comparisons as printed."""

from collections.abc import Sequence
from pathlib import Path

from captioner.runtime.errors import escape_controls
from captioner.scoring.predictions import Prediction
from captioner.scoring.scores import HEADLINES


def print_left_out(unreadable: dict[str, str]) -> None:
    if unreadable:
        print(f"{len(unreadable):,} images can't be read and are left out:")
        print(escape_controls("\n".join(f"  {reason}" for reason in list(unreadable.values())[:10])))


TITLES = {  # of the printed table, in the order of HEADLINES
    "facts_f1": "facts F1",
    "time_of_day": "time",
    "weather": "weather",
    "scene": "scene",
    "traffic_light": "light",
    "objects_f1": "objects",
    "whole_caption": "whole",
    "BLEU-4": "BLEU-4",
    "CIDEr-D": "CIDEr-D",
}


def print_scores(scores: dict) -> None:
    """Headline scores with half the width of their intervals, and the floors beneath."""
    print(f"\n{scores['n']:,} images. Shares of right facts, F1 for facts and objects; ± half the 95 % interval")
    print(f"{'':<26}" + "".join(f"{title:>10}" for title in TITLES.values()))
    own = {name: scores["scores"][group][name] for name, group in HEADLINES.items()}
    digits = {name: choose_digits(figure) for name, figure in own.items()}
    for row, groups in {"predictions": scores["scores"], **scores["floors"]}.items():
        values = [format_value(groups[group][name]["value"], digits[name]) for name, group in HEADLINES.items()]
        print(f"{row:<26}" + "".join(f"{value:>10}" for value in values))
        if row == "predictions":
            halves = [format_half(own[name], digits[name]) for name in HEADLINES]
            print(f"{'':<26}" + "".join(f"{half:>10}" for half in halves))
    for group, title in {"corpus_bleu": "corpus BLEU", "reference_bleu": "reference protocol"}.items():
        figures = scores["scores"][group].items()
        print(f"{title:<26}" + "  ".join(f"{name} {figure['value']:.3f}" for name, figure in figures))
    stating = [item for item in scores["slices"] if item["scores"]["facts_f1"]["value"] is not None]
    worst = [f"{item['by']} {item['value']} {item['scores']['facts_f1']['value']:.2f}" for item in stating[:3]]
    if worst:
        print(f"{'worst slices, facts F1':<26}" + ", ".join(worst))
    print("\n".join(f"note: {note}" for note in scores["notes"]))
    print(f"signature: {scores['signatures']['corpus_bleu']}")
    for reason, count in scores.get("left_out", {}).items():
        print(f"left out: {count:,} {reason}")


def choose_digits(figure: dict) -> int:
    """Decimals that the width of the interval supports."""
    if figure["low"] is None:
        return 2
    half = (figure["high"] - figure["low"]) / 2
    return 2 if half >= 0.05 else 3


def format_value(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def format_half(figure: dict, digits: int) -> str:
    return "" if figure["low"] is None else f"±{(figure['high'] - figure['low']) / 2:.{digits}f}"


def print_captions(predictions: Sequence[Prediction], count: int) -> None:
    for prediction in predictions[:count]:
        references = "".join(f"\n  reference:  {reference}" for reference in prediction.references)
        print(escape_controls(f"\n{prediction.name}\n  prediction: {prediction.prediction}{references}"))


def print_comparison(compared: dict, one: Path, other: Path) -> None:
    print(f"A {one}\nB {other}\n{compared['n']:,} images that both captioned")
    for name, count in (("A", compared["only_in_one"]), ("B", compared["only_in_other"])):
        if count:
            print(f"{count:,} images only {name} captioned are left out")
    print(f"{'':<18}{'A':>9}{'B':>9}{'B - A':>9}   {'95 % interval':<18}{'p':>7}")
    for name, row in compared["scores"].items():
        values = f"{row['one']:>9.3f}{row['other']:>9.3f}{row['difference']:>+9.3f}"
        interval = f"{row['low']:+.3f} to {row['high']:+.3f}"
        print(f"{name:<18}{values}   {interval:<18}{row['p']:>7.3f}")
    print("".join(f"note: {note}\n" for note in compared["notes"]), end="")
    print("paired bootstrap; many scores are compared at once, so one p below 0.05 alone says little")
