"""Scores, captions and comparisons as printed."""

from collections.abc import Sequence

from captioner.runtime.errors import escape_controls
from captioner.scoring.headlines import HEADLINES, RANKED_BY, choose_headlines
from captioner.scoring.predictions import Prediction
from captioner.scoring.scores import count_things, describe_size

WORST = 3  # slices that are printed


def print_left_out(unreadable: dict[str, str]) -> None:
    if unreadable:
        are = "is" if len(unreadable) == 1 else "are"
        print(f"{count_things(len(unreadable), 'image')} can't be read and {are} left out:")
        print(escape_controls("\n".join(f"  {reason}" for reason in list(unreadable.values())[:10])))


def print_scores(scores: dict) -> None:
    """Headline scores with the ends of their intervals, and the floors beneath."""
    shown = choose_headlines(scores["scores"])
    what = "Shares of right facts, F1 for facts and objects" if RANKED_BY in shown else "Likeness to the references"
    print(f"\n{describe_size(scores['n'], scores['rides'])}. {what}; 95 % intervals")
    print(f"{'':<26}" + "".join(f"{headline.title:>10}" for headline in shown.values()))
    own = {name: headline.find(scores["scores"], name) for name, headline in shown.items()}
    digits = {name: choose_digits(figure) for name, figure in own.items()}
    for row, groups in {"predictions": scores["scores"], **scores["floors"]}.items():
        figures = {name: headline.find(groups, name) for name, headline in shown.items()}
        print(f"{row:<26}" + "".join(f"{format_value(figures[name]['value'], digits[name]):>10}" for name in figures))
        if row == "predictions":
            for end, title in (("low", "  from"), ("high", "  to")):
                print(f"{title:<26}" + "".join(f"{format_value(own[name][end], digits[name]):>10}" for name in own))
    for group, title in {"corpus_bleu": "corpus BLEU", "reference_bleu": "mean sentence BLEU"}.items():
        figures = scores["scores"][group].items()
        print(f"{title:<26}" + "  ".join(f"{name} {figure['value']:.3f}" for name, figure in figures))
    stating = [item for item in scores.get("slices", ()) if item["scores"][RANKED_BY]["value"] is not None]
    if stating:
        worst = ", ".join(map(format_slice, stating[:WORST]))
        which = f"worst of {len(stating)} slices" if len(stating) > 1 else "the only slice"
        print(f"{which}, {HEADLINES[RANKED_BY].title}: {worst}")
    print("\n".join(f"note: {note}" for note in scores["notes"]))
    print(f"signature: {scores['signatures']['corpus_bleu']}")
    for reason, count in scores.get("left_out", {}).items():
        print(f"left out, {reason}: {count:,}")


def format_slice(item: dict) -> str:
    figure = item["scores"][RANKED_BY]
    interval = "" if figure["low"] is None else f" [{figure['low']:.2f}, {figure['high']:.2f}]"
    return f"{item['by']} {item['value']} {figure['value']:.2f}{interval} (n {item['n']:,})"


def choose_digits(figure: dict) -> int:
    """Decimals that the width of the interval supports."""
    if figure["low"] is None:
        return 2
    half = (figure["high"] - figure["low"]) / 2
    return 2 if half >= 0.05 else 3


def format_value(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def print_captions(predictions: Sequence[Prediction], count: int) -> None:
    for prediction in predictions[:count]:
        references = "".join(f"\n  reference:  {reference}" for reference in prediction.references)
        print(escape_controls(f"\n{prediction.name}\n  prediction: {prediction.prediction}{references}"))


def print_comparison(compared: dict) -> None:
    one, other = compared["files"]["one"], compared["files"]["other"]
    print(f"A {', '.join(one)}\nB {', '.join(other)}")
    print(f"{describe_size(compared['n'], compared['rides'])}, captioned by all of these")
    for name, count in (("A", compared["only_in_one"]), ("B", compared["only_in_other"])):
        if count:
            print(f"left out, images that only {name} captioned: {count:,}")
    several = len(one) + len(other) > 2
    spread = f"   {'spread A':>9}{'B':>8}   {'over seeds':<18}" if several else ""
    print(f"{'':<22}{'A':>9}{'B':>9}{'B - A':>9}   {'95 % interval':<18}{'p':>7}{spread}")
    for name, row in compared["scores"].items():
        values = f"{row['one']:>9.3f}{row['other']:>9.3f}{row['difference']:>+9.3f}"
        line = f"{name:<22}{values}   {format_interval(row):<18}{row['p']:>7.3f}"
        if several:
            a, b = (format_value(row["spread"][side], 4) for side in ("one", "other"))
            line += f"   {a:>9}{b:>8}   {format_interval(row['seeds']):<18}"
        print(line.rstrip())
    print("".join(f"note: {note}\n" for note in compared["notes"]), end="")
    print("intervals by rides, p by exchanging rides; many scores are compared, so that one p below 0.05 says little")
    if several:
        print("95 % interval: for other images; spread (standard deviation), over seeds: for other seeds of training")


def format_interval(figure: dict | None) -> str:
    return "–" if figure is None or figure["low"] is None else f"{figure['low']:+.3f} to {figure['high']:+.3f}"
