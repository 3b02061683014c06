"""What labels hold, as tables and as an image."""

import math
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import pandas as pd

from captioner.bdd100k.facts import ObjectKind
from captioner.bdd100k.label_report import LabelReport

MOST_BINS = 80  # of a histogram


def print_census(report: LabelReport, tokens: Counter[int], tokenizer: str) -> None:
    """What the labels hold, as tables."""
    for name, counts in report.attributes.items():
        shares = ", ".join(f"{value} {count / report.frames:.1%}" for value, count in counts.most_common())
        print(f"{name.replace('_', ' ')}: {shares}")
    classes = tabulate_classes(report.objects)
    shares = classes[["occluded", "truncated"]].div(classes["objects"], axis=0)
    table = pd.concat([classes["objects"], (classes["objects"] / report.frames).rename("a frame"), shares], axis=1)
    forms = {"objects": "{:,}".format, "a frame": "{:.2f}".format}
    forms |= dict.fromkeys(shares, "{:.1%}".format)
    print(f"\n{table.to_string(formatters=forms, col_space=9, index_names=False)}")
    print(f"\nobjects a frame, lanes and areas aside: {summarise(report.boxes_a_frame)}")
    print(f"near-duplicate boxes: {report.near_duplicates:,}")
    print(f"words a caption: {summarise(report.caption_words)}")
    print(f"tokens a caption ({tokenizer}, {tokens.total():,} captions): {summarise(tokens)}")


def tabulate_classes(objects: Counter[ObjectKind]) -> pd.DataFrame:
    """Objects of each class, the most frequent first: all, in full view, occluded, truncated."""
    rows = [
        (kind.name, n, n * (not kind.occluded and not kind.truncated), n * kind.occluded, n * kind.truncated)
        for kind, n in objects.items()
    ]
    table = pd.DataFrame(rows, columns=["class", "objects", "in full view", "occluded", "truncated"])
    return table.groupby("class", sort=False).sum().sort_values("objects", ascending=False, kind="stable")


def summarise(counts: Counter[int]) -> str:
    """Mean, quartiles and ends of a distribution."""
    values = sorted(counts.elements())
    quartiles = "/".join(str(values[len(values) * quarter // 4]) for quarter in (1, 2, 3))
    return f"mean {sum(values) / len(values):.1f}, quartiles {quartiles}, {values[0]} to {values[-1]}"


def draw_census(report: LabelReport, tokens: Counter[int], path: Path) -> None:
    """What the labels hold, as an image."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(17, 7.5), layout="constrained")
    bars = {name.replace("_", " "): counts for name, counts in report.attributes.items()}
    for axis, (title, counts) in zip(axes[0], bars.items(), strict=False):
        names, frames = zip(*reversed(counts.most_common()), strict=True)
        axis.barh(names, frames, color="#3a6ea5")
        axis.set(title=title, xlabel="frames")
    draw_classes(axes[1][0], report.objects)
    lengths = {"objects a frame": report.boxes_a_frame, "words a caption": report.caption_words}
    for axis, (title, counts) in zip(axes[1][1:], {**lengths, "tokens a caption": tokens}.items(), strict=True):
        axis.hist(list(counts), weights=list(counts.values()), bins=cut_bins(counts), color="#3a6ea5")
        axis.set(title=title, ylabel="frames")
    figure.suptitle(f"{report.frames:,} frames ({', '.join(report.variants)}), {report.skipped.total():,} left out")
    figure.savefig(path, dpi=110)


def cut_bins(values: Collection[int]) -> list[float]:
    """Edges of at most MOST_BINS bins for whole numbers: each bin has as many of them as every other."""
    first, last = min(values), max(values)
    width = math.ceil((last - first + 1) / MOST_BINS)
    return [edge - 0.5 for edge in range(first, last + width + 1, width)]


def draw_classes(axis, objects: Counter[ObjectKind]) -> None:
    """Objects of each class, in full view, occluded and truncated, on a logarithmic axis."""
    table = tabulate_classes(objects)[::-1]
    for row, look in enumerate(["in full view", "occluded", "truncated"]):
        places = [position + 0.27 * (1 - row) for position in range(len(table))]
        axis.barh(places, table[look], 0.25, label=look)
    axis.set_yticks(range(len(table)), table.index)
    axis.set(title="objects", xscale="log")
    axis.legend(fontsize="small")
