"""Floors: captions of the same images that need no look at them. No torch.

floors = make_floors(references, training, rides, seed=1)      # {"most frequent caption": [text, ...], ...}
"""

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np

from captioner.scoring.text_metrics import ORDERS, References, score_bleu_sums, tokenize_coco

CANDIDATES = 300  # distinct captions that are tried as the best constant one
JUDGES = 10_000  # captions, at most, against which they are tried


def make_floors(
    references: Sequence[Sequence[str]], training: Sequence[str] | None, rides: Sequence[str], seed: int
) -> dict[str, list[str]]:
    """Captions for the images of `references` that need no look at them, by what they are.

    The most frequent caption and, of many, the one that has the highest BLEU-4 if it is said of every image: both are
    chosen among `training` captions, or among the references where there are none, which flatters them. And another
    image's reference, of another ride wherever no ride has most of the images; left out when there is one image only.
    """
    first = [row[0] for row in references]
    known = [[text] for text in training] if training else references
    floors = {
        "most frequent caption": [Counter(row[0] for row in known).most_common(1)[0][0]] * len(first),
        "best constant caption": [find_best_constant(known, seed)] * len(first),
    }
    if len(first) < 2:
        return floors
    order = random.Random(seed).sample(range(len(first)), len(first))
    place = {ride: position for position, ride in enumerate(rides[image] for image in order)}
    order.sort(key=lambda image: place[rides[image]])  # the images of a ride side by side
    farther = max(Counter(rides).values()) % len(first) or 1  # by so many that nobody gets its own ride's
    another = [""] * len(first)
    for here, there in zip(order, order[farther:] + order[:farther], strict=True):
        another[here] = first[there]
    return {**floors, "another image's caption": another}


def find_best_constant(references: Sequence[Sequence[str]], seed: int) -> str:
    """Of CANDIDATES distinct references, frequent and random ones, that with the best corpus BLEU-4 for all."""
    if len(references) > JUDGES:
        references = random.Random(seed).sample(references, JUDGES)
    frequency = Counter(row[0] for row in references)
    frequent = [text for text, _ in frequency.most_common(CANDIDATES // 3)]
    rest = sorted(frequency.keys() - set(frequent))
    candidates = frequent + random.Random(seed).sample(rest, min(len(rest), CANDIDATES - len(frequent)))
    known = References(references, candidates, tokenize_coco)
    # by order: matches[gram][c - 1], how often a caption with c of this gram finds one in all references together
    matches = [_sum_clipped(*known.most[order], grams) for order, grams in enumerate(known.texts.gram_counts)]
    sums = np.zeros((len(candidates), 10))
    for row, text in enumerate(known.texts.find(candidates).tolist()):
        length = int(known.texts.lengths[text])
        closest = known.closest_lengths(np.full(known.size, length)).sum()
        guesses = [max(length - n + 1, 0) * known.size for n in ORDERS]
        found = []
        for order, table in enumerate(matches):
            entries = known.texts.expand(order, np.array([text]))
            found.append(table[entries.gram, np.minimum(entries.count, table.shape[1]) - 1].sum())
        sums[row] = [length * known.size, closest, *found, *guesses]
    return candidates[int(score_bleu_sums(sums)[:, 3].argmax())]


def _sum_clipped(keys: np.ndarray, most: np.ndarray, grams: int) -> np.ndarray:
    """(grams, C): the sum over all references of min(count, c) for c = 1 to the largest count."""
    largest = int(most.max()) if len(most) else 1
    columns = [np.bincount(keys % grams, np.minimum(most, c), grams) for c in range(1, min(largest, 50) + 1)]
    return np.stack(columns, axis=1)
