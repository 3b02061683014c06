"""Scores of captions against their references. No torch.

bleu = score_bleu(["a red car"], [["a red car", "one red car"]])
"""

import random
import re
import warnings
from collections import Counter
from collections.abc import Sequence

import nltk
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu, sentence_bleu

from captions import Facts

# What pycocoevalcap drops after PTB tokenisation.
COCO_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
# The Penn Treebank's names of brackets. COCO's list has them in capitals, so once lower-cased they stay.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Za-z]\.)\s+")  # not after U.S. and the like
_WORD_TOKENIZER = NLTKWordTokenizer()


def tokenize_coco(text: str) -> list[str]:
    """Tokens as in COCO's evaluation: Penn Treebank, lower case, punctuation dropped (but not `*`).

    nltk splits a full stop only at the end of a text, hence sentence by sentence, and each of several stars.
    """
    tokens = []
    for sentence in _SENTENCE_END.split(text.strip()):
        for stars, words in re.findall(r"(\*+)|([^*]+)", sentence):
            tokens += [stars] if stars else _WORD_TOKENIZER.tokenize(words)
    lower = (_BRACKETS.get(token, token.lower()) for token in tokens)
    return [token for token in lower if token not in COCO_PUNCTUATION]


def score_bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Corpus BLEU-1 to BLEU-4, 0 to 1, on COCO tokens, unsmoothed (Papineni et al. 2002, closest reference length)."""
    tokens = [tokenize_coco(prediction) for prediction in predictions]
    reference_tokens = [[tokenize_coco(reference) for reference in row] for row in references]
    weights = [tuple(1 / n for _ in range(n)) for n in range(1, 5)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no overlap at all is a score of 0 here, not a reason to warn
        scores = corpus_bleu(reference_tokens, tokens, weights=weights)
    return {f"BLEU-{n}": float(score) for n, score in enumerate(scores, start=1)}


def score_reference_bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-1 to BLEU-4 as the reference's code has it: mean of sentence BLEU, smoothing method4, split at spaces.

    Its BLEU-3 weighs 0.33 three times. method4 differs between nltk versions, so the signature names the version.
    """
    weights = [(1,), (0.5, 0.5), (0.33, 0.33, 0.33), (0.25, 0.25, 0.25, 0.25)]
    smoothing = SmoothingFunction().method4
    totals = [0.0] * len(weights)
    for prediction, row in zip(predictions, references, strict=True):
        tokens = prediction.lower().split()
        if not tokens:
            continue  # an empty prediction scores 0
        reference_tokens = [reference.lower().split() for reference in row]
        for n, weight in enumerate(weights):
            totals[n] += float(sentence_bleu(reference_tokens, tokens, weight, smoothing_function=smoothing))
    return {f"BLEU-{n}": total / len(predictions) for n, total in enumerate(totals, start=1)}


def make_signature(**facts) -> str:
    """One line that says how a score came about, in the manner of sacrebleu."""
    facts |= {"nltk": nltk.__version__}
    return "|".join(f"{name}:{value}" for name, value in facts.items())


# --------------------------------------------------------------------------------------------------------------
# facts


def score_facts(predictions: Sequence[Facts], references: Sequence[Facts]) -> dict[str, float | None]:
    """Shares, 0 to 1, of what the captions get right.

    Accuracy of time of day, weather, scene and traffic light ("no light" included); precision, recall and F1 of the
    object sentences, one right when kind and count both are, pooled over all captions; and whole captions. Counted are
    the captions whose reference states the fact, or any fact; None where no reference does.
    """
    stating = [(p, r) for p, r in zip(predictions, references, strict=True) if r != Facts()]
    scores = {}
    for name in ("time_of_day", "weather", "scene", "traffic_light"):
        rows = [(p, r) for p, r in stating if name == "traffic_light" or getattr(r, name) is not None]
        right = sum(getattr(p, name) == getattr(r, name) and p != Facts() for p, r in rows)
        scores[name] = right / len(rows) if rows else None
    said = sum(len(facts.objects) for facts in predictions)
    there = sum(len(facts.objects) for facts in references)
    right = sum(len(p.objects.items() & r.objects.items()) for p, r in zip(predictions, references, strict=True))
    scores["objects_precision"] = (right / said if said else 0.0) if there else None
    scores["objects_recall"] = right / there if there else None
    scores["objects_f1"] = 2 * right / (said + there) if there else None
    scores["whole_caption"] = sum(p == r for p, r in stating) / len(stating) if stating else None
    return scores


# --------------------------------------------------------------------------------------------------------------
# floors


def make_floors(references: Sequence[Sequence[str]], seed: int) -> dict[str, list[str]]:
    """Predictions that need no look at the picture: the most frequent reference, and another picture's reference.

    The second is left out when there is one picture only.
    """
    first = [row[0] for row in references]
    floors = {"most frequent caption": [Counter(first).most_common(1)[0][0]] * len(first)}
    if len(first) < 2:
        return floors
    order = random.Random(seed).sample(range(len(first)), len(first))
    another = [""] * len(first)
    for here, there in zip(order, order[1:] + order[:1], strict=True):  # one round through all: nobody gets its own
        another[here] = first[there]
    return {**floors, "another picture's caption": another}
