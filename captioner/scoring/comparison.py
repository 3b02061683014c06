"""How two systems differ, each of one or several predictions files: the content of comparison.json. No torch.

    compared = compare_files([run_1, run_2], [other_1, other_2])     # paths

Several files of one system are those of its other seeds of training: a score of the system is that of all its captions
together, and how far its files lie apart is what training leaves to chance.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from scipy.special import stdtrit

from captioner.bdd100k.parsing import read_caption
from captioner.runtime.errors import UserError
from captioner.scoring import bootstrap, fact_metrics, text_metrics
from captioner.scoring.bootstrap import BOOTSTRAP_SEED, LEVEL, RESAMPLES, Metric, Rides
from captioner.scoring.grammar import find_facts
from captioner.scoring.headlines import HEADLINES, MORE
from captioner.scoring.predictions import Prediction, find_ride, read_predictions, read_references
from captioner.scoring.scores import FEW, SCHEMA_VERSION, count_things

COMPARED = ("facts", "corpus_bleu", "cider_d", "rouge_l", "hallucination")  # groups of scores, if they are measured
System = Sequence[Sequence[Prediction]]  # the rows of each of its files


def compare_files(one: Sequence[Path], other: Sequence[Path], references: Path | None = None) -> dict:
    """What compare_predictions says of the predictions files of two systems, and "files".

    The references in the file `references`, if given, stand in for those of the predictions files. Prints what is left
    out of each. Raises UserError for files that can't be compared.
    """
    known, sides = read_references(references) if references else None, ([], [])
    for paths, side in zip((one, other), sides, strict=True):
        for path in paths:
            rows, left_out = read_predictions(path, known)
            side.append(rows)
            for reason, count in left_out.items():
                print(f"left out of {path}, {reason}: {count:,}")
    files = {"one": list(map(str, one)), "other": list(map(str, other))}
    try:
        return compare_predictions(*sides) | {"files": files}
    except ValueError as error:
        raise UserError(f"--compare {' '.join(map(str, (*one, *other)))}: {error}") from None


def compare_predictions(one: System, other: System, resamples: int = RESAMPLES) -> dict:
    """Scores of two systems on the images that all their files captioned, their differences, intervals and p-values.

    Raises ValueError when there is no such image, or the references of one differ between files.
    """
    files = [{row.name: row for row in rows} for rows in (*one, *other)]
    names = [name for name in files[0] if all(name in rows for rows in files)]
    if not names:
        raise ValueError("the files share no image")
    check_references(files, names)
    references = [files[0][name].references for name in names]
    facts = find_facts([texts[0] for texts in references])
    sets = {str(place): [rows[name].prediction for name in names] for place, rows in enumerate(files)}
    measured = text_metrics.measure_texts(references, sets)
    for name, texts in sets.items():
        if facts:
            measured[name] |= fact_metrics.measure_facts(list(map(read_caption, texts)), facts)
        measured[name] = {group: measured[name][group] for group in COMPARED if group in measured[name]}
    measures = list(measured.values())
    sides = measures[: len(one)], measures[len(one) :]
    tell_rides = [next((rows[name] for rows in files if rows[name].ride), files[0][name]) for name in names]
    rides, compared = Rides([find_ride(row) for row in tell_rides], resamples), {}
    for group in measures[0]:
        first, second = ([groups[group] for groups in side] for side in sides)
        most = max(len(first), len(second))
        figures = bootstrap.compare_metrics(join_files(first, most), join_files(second, most), rides)
        if len(files) > 2:
            figures = {name: figure | measure_spread(name, first, second) for name, figure in figures.items()}
        compared |= figures
    shown = {**HEADLINES, **MORE}
    few = f"{count_things(rides.size, 'ride')}: too few for intervals and p-values to be relied on"
    return {
        "schema": SCHEMA_VERSION,
        "n": len(names),
        "rides": rides.size,
        "notes": [few] if rides.size < FEW else [],
        "only_in_one": len(set().union(*files[: len(one)])) - len(names),
        "only_in_other": len(set().union(*files[len(one) :])) - len(names),
        "resamples": resamples,
        "bootstrap_seed": BOOTSTRAP_SEED,
        "scores": {name: compared[name] for name in [*filter(compared.get, shown), *compared] if name in compared},
    }


def check_references(files: Sequence[dict[str, Prediction]], names: Sequence[str]) -> None:
    """Raise ValueError where an image has other references in one file than in the first."""
    for rows in files[1:]:
        if differing := [name for name in names if rows[name].references != files[0][name].references]:
            raise ValueError(
                f"{len(differing):,} of {len(names):,} images, {differing[0][:80]} for one, have other references in "
                "one file than in another, so that their scores can't be compared; give the same to all with "
                "--references"
            )


def join_files(metrics: Sequence[Metric], count: int) -> Metric:
    """The metric of all files of a system together, each caption's statistics as if there were `count` files."""
    return metrics[0]._replace(statistics=np.mean([metric.statistics for metric in metrics], axis=0) * count)


def measure_spread(name: str, one: Sequence[Metric], other: Sequence[Metric]) -> dict:
    """{"files": the score of each file, "spread": standard deviations, "seeds": interval of the difference}.

    The interval is Welch's over files, for other seeds of training on the same images; None unless both systems have
    two files or more.
    """
    values = [[text_metrics.score(metric)[name] for metric in side] for side in (one, other)]
    spread = [stdev(side) if len(side) > 1 else None for side in values]
    low, high = (None, None) if None in spread else bound_means(*values)
    return {
        "files": {"one": values[0], "other": values[1]},
        "spread": {"one": spread[0], "other": spread[1]},
        "seeds": None if low is None else {"low": low, "high": high},
    }


def bound_means(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Welch's (1947) interval of mean(other) - mean(one)."""
    variances = [(stdev(values) ** 2 / len(values), len(values) - 1) for values in (one, other)]
    total = sum(variance for variance, _ in variances)
    difference = mean(other) - mean(one)
    if total == 0:
        return difference, difference
    freedom = total**2 / sum(variance**2 / size for variance, size in variances)
    half = -float(stdtrit(freedom, (1 - LEVEL) / 2)) * math.sqrt(total)
    return difference - half, difference + half
