"""Text metrics of captions against their references. No torch.

    bleu = score_bleu(["a red car"], [["a red car", "one red car"]])

Each metric is kept as a `Metric`: statistics of each caption, whose sums give the scores. So a bootstrap is one matrix
product, and a slice one sum over some rows. Shapes: N captions, K statistics, M scores.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import nltk
import numpy as np
from nltk.tokenize import NLTKWordTokenizer

from captioner.scoring.bootstrap import Metric

# What pycocoevalcap drops after PTB tokenisation.
COCO_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
# The Penn Treebank's names of brackets. COCO's list has them in capitals, so once lower-cased they stay.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Za-z]\.)\s+")  # not after U.S. and the like
_WORD_TOKENIZER = NLTKWordTokenizer()

ORDERS = (1, 2, 3, 4)  # n of the n-grams
BLEU_NAMES = tuple(f"BLEU-{n}" for n in ORDERS)
BLOCK = 5_000  # captions whose n-grams are in memory at once
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0
METEOR_WEIGHTS = {"alpha": 0.9, "beta": 3.0, "gamma": 0.5}  # those of nltk, and of the first METEOR


# --------------------------------------------------------------------------------------------------------------
# tokens and n-grams


def tokenize_coco(text: str) -> list[str]:
    """Tokens as in COCO's evaluation: Penn Treebank, lower case, punctuation dropped (but not `*`).

    nltk splits a full stop only at the end of a text, hence sentence by sentence, and each of several stars.
    """
    return [token for sentence in _SENTENCE_END.split(text.strip()) for token in _tokenize_sentence(sentence)]


@functools.lru_cache(maxsize=2**16)  # captions are made of the same sentences again and again
def _tokenize_sentence(sentence: str) -> list[str]:
    tokens = []
    for stars, words in re.findall(r"(\*+)|([^*]+)", sentence):
        tokens += [stars] if stars else _WORD_TOKENIZER.tokenize(words)
    lower = (_BRACKETS.get(token, token.lower()) for token in tokens)
    return [token for token in lower if token not in COCO_PUNCTUATION]


def tokenize_spaces(text: str) -> list[str]:
    """Tokens of the reference's code."""
    return text.lower().split()


class _Entries(NamedTuple):
    """Counts of n-grams: one entry for each n-gram of each row, sorted by row and n-gram."""

    row: np.ndarray  # (E,)
    gram: np.ndarray  # (E,)
    count: np.ndarray  # (E,)


class Texts:
    """Distinct texts, tokenised once, and the counts of their n-grams."""

    def __init__(self, texts: Iterable[str], tokenize: Callable[[str], list[str]]):
        self.index = {text: position for position, text in enumerate(dict.fromkeys(texts))}
        self.tokens = [tokenize(text) for text in self.index]
        self.lengths = np.array([len(tokens) for tokens in self.tokens], dtype=np.int64)  # (texts,)
        vocabulary: dict[str, int] = {}
        flat = [vocabulary.setdefault(token, len(vocabulary)) for tokens in self.tokens for token in tokens]
        words = np.array(flat, dtype=np.int64)
        row = np.repeat(np.arange(len(self.tokens)), self.lengths)
        left = np.repeat(np.cumsum(self.lengths), self.lengths) - np.arange(len(words))  # tokens to the text's end
        grams, self.entries, self.gram_counts = words, [], []  # by order: entries and number of distinct n-grams
        self.hashes: list[np.ndarray] = []  # by order: of the distinct n-grams, the same in other Texts
        self._starts = []
        for n in ORDERS:
            whole = left >= n
            distinct, gram = np.unique(grams[whole], return_inverse=True)
            self.hashes.append(self._hash_grams(distinct, vocabulary))
            entries = _count(row[whole], gram, max(len(distinct), 1))
            self.gram_counts.append(max(len(distinct), 1))
            self.entries.append(entries)
            self._starts.append(np.searchsorted(entries.row, np.arange(len(self.tokens) + 1)))
            if n < len(ORDERS):  # an (n+1)-gram is an n-gram and the word after it
                longer = np.zeros(len(words), dtype=np.int64)
                longer[whole] = gram
                following = np.zeros(len(words), dtype=np.int64)
                following[: max(len(words) - n, 0)] = words[n:]
                grams = longer * max(len(vocabulary), 1) + following

    def _hash_grams(self, grams: np.ndarray, vocabulary: dict[str, int]) -> np.ndarray:
        """64-bit hashes of distinct n-grams, the same in all Texts of this process.

        An n-gram is given as p * (size of the vocabulary) + w: p is the place of its first n - 1 words among the
        distinct (n - 1)-grams, w the number of its last word.
        """
        words = np.fromiter(map(hash, vocabulary), dtype=np.int64, count=len(vocabulary)).view(np.uint64)
        if not self.hashes:
            return words[grams]
        before, last = np.divmod(grams, max(len(vocabulary), 1))
        return self.hashes[-1][before] * np.uint64(0x9E3779B97F4A7C15) + words[last]

    def find(self, texts: Iterable[str]) -> np.ndarray:
        """Positions of texts among the distinct ones."""
        return np.fromiter((self.index[text] for text in texts), dtype=np.int64)

    def expand(self, order: int, which: np.ndarray) -> _Entries:
        """The entries of the texts `which` (rows,), rows numbered anew."""
        entries, starts = self.entries[order], self._starts[order]
        begin, sizes = starts[which], starts[which + 1] - starts[which]
        rows = np.repeat(np.arange(len(which)), sizes)
        take = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes) + np.repeat(begin, sizes)
        return _Entries(rows, entries.gram[take], entries.count[take])


def _count(row: np.ndarray, gram: np.ndarray, grams: int) -> _Entries:
    keys, count = np.unique(row * grams + gram, return_counts=True)
    return _Entries(keys // grams, keys % grams, count)


class References:
    """The references of N captions, and all texts that will be scored against them, in one tokenisation."""

    def __init__(self, references: Sequence[Sequence[str]], predictions: Iterable[str], tokenize):
        if not references or not all(references):
            raise ValueError("each caption needs a reference at least")
        self.texts = Texts([*itertools.chain.from_iterable(references), *predictions], tokenize)
        self.size = len(references)
        self.pair_row = np.repeat(np.arange(self.size), [len(row) for row in references])  # (pairs,)
        self.pair_text = self.texts.find(itertools.chain.from_iterable(references))  # (pairs,)

    @functools.cached_property
    def most(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """By order: keys row * grams + gram, sorted, and the most often that one reference of the row has the gram."""
        most = []
        for order, grams in enumerate(self.texts.gram_counts):
            entries = self.texts.expand(order, self.pair_text)
            keys = self.pair_row[entries.row] * grams + entries.gram
            order_of = np.argsort(keys, kind="stable")
            distinct, first = np.unique(keys[order_of], return_index=True)
            counts = entries.count[order_of]
            most.append((distinct, np.maximum.reduceat(counts, first) if len(counts) else counts))
        return most

    def closest_lengths(self, lengths: np.ndarray) -> np.ndarray:
        """(N,) lengths of the references that come closest to the predictions' `lengths`, the shorter on ties."""
        pair_lengths = self.texts.lengths[self.pair_text]
        distance = np.abs(pair_lengths - lengths[self.pair_row])
        order = np.lexsort((pair_lengths, distance, self.pair_row))
        return pair_lengths[order][np.searchsorted(self.pair_row[order], np.arange(self.size))]


def _look_up(keys: np.ndarray, sorted_keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The values of `keys`, 0 where there is none."""
    if not len(sorted_keys):
        return np.zeros(len(keys), dtype=values.dtype)
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return np.where(sorted_keys[place] == keys, values[place], 0)


# --------------------------------------------------------------------------------------------------------------
# BLEU


def _match_grams(references: References, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the texts `predicted` (N,): lengths (N,), closest reference lengths (N,), clipped matches by order (N, 4)."""
    lengths = references.texts.lengths[predicted]
    matches = np.zeros((references.size, len(ORDERS)))
    for order, grams in enumerate(references.texts.gram_counts):
        entries = references.texts.expand(order, predicted)
        most = _look_up(entries.row * grams + entries.gram, *references.most[order])
        matches[:, order] = np.bincount(entries.row, np.minimum(entries.count, most), references.size)
    return lengths, references.closest_lengths(lengths), matches


def measure_bleu(references: References, predictions: Sequence[str]) -> Metric:
    """Corpus BLEU-1 to BLEU-4, 0 to 1 (Papineni et al. 2002), smoothed as pycocoevalcap does: by 1e-15 and 1e-9."""
    lengths, closest, matches = _match_grams(references, references.texts.find(predictions))
    guesses = np.maximum(lengths[:, None] - np.array(ORDERS) + 1, 0)
    return Metric(BLEU_NAMES, np.hstack([lengths[:, None], closest[:, None], matches, guesses]), score_bleu_sums)


def score_bleu_sums(sums: np.ndarray) -> np.ndarray:
    """(..., 4) BLEU-1 to BLEU-4 of sums (..., 10): lengths, closest reference lengths, matches and guesses by order."""
    lengths, closest, matches, guesses = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
    logs = np.log((matches + 1e-15) / (guesses + 1e-9))
    ratio = (lengths + 1e-15) / (closest + 1e-9)
    brevity = np.where(ratio < 1, np.exp(np.minimum(1 - 1 / ratio, 0)), 1)
    return np.exp(np.cumsum(logs, axis=-1) / np.array(ORDERS)) * brevity[..., None]


def measure_reference_bleu(references: References, predictions: Sequence[str]) -> Metric:
    """BLEU-1 to BLEU-4 by the reference code's protocol: mean of nltk's sentence BLEU, method4, split at spaces.

    Its BLEU-3 weighs 0.33 three times. method4 (Chen and Cherry 2014) is that of nltk 3.10: a count of zero becomes
    ln(length) / (5 * 2^i), i counting the zeros.
    """
    lengths, closest, matches = _match_grams(references, references.texts.find(predictions))
    denominators = np.maximum(lengths[:, None] - np.array(ORDERS) + 1, 1)
    zero = (matches == 0) & (lengths > 1)[:, None]
    smoothed = np.log(np.maximum(lengths, 1))[:, None] / (5 * 2.0 ** np.cumsum(zero, axis=1))
    numerators = np.where(zero, smoothed, matches)
    with np.errstate(divide="ignore"):
        logs = np.where(numerators > 0, np.log(numerators / denominators), 0)  # nltk leaves out what stays zero
        brevity = np.where(lengths > closest, 1, np.exp(1 - closest / np.maximum(lengths, 1)))
    weights = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.33, 0.33, 0.33, 0], [0.25] * 4])
    scores = np.exp(logs @ weights.T) * (brevity * (matches[:, 0] > 0))[:, None]
    return measure_mean(BLEU_NAMES, scores)


def measure_mean(names: tuple[str, ...], scores: np.ndarray, are_shares: bool = False) -> Metric:
    """The mean of each caption's scores (N, M), which are shares of captions if each is 0 or 1."""
    statistics = np.hstack([scores, np.ones((len(scores), 1))])
    trials = (lambda sums: np.repeat(sums[..., -1:], len(names), axis=-1)) if are_shares else None
    return Metric(names, statistics, lambda sums: divide(sums[..., :-1], sums[..., -1:]), trials)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where b is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(b == 0, np.nan, a / b)


# --------------------------------------------------------------------------------------------------------------
# ROUGE-L, CIDEr-D, METEOR


def measure_rouge(references: References, predictions: Sequence[str]) -> Metric:
    """Mean ROUGE-L, 0 to 1 (Lin 2004), as pycocoevalcap has it: beta 1.2, best precision and best recall."""
    predicted = references.texts.find(predictions)
    tokens = references.texts.tokens
    common: dict[tuple[int, int], int] = {}
    best = np.zeros((references.size, 2))  # precision, recall
    for row, reference in zip(references.pair_row.tolist(), references.pair_text.tolist(), strict=True):
        pair = int(predicted[row]), reference
        if pair not in common:
            common[pair] = _common_length(tokens[pair[0]], tokens[reference])
        shares = common[pair] / max(len(tokens[pair[0]]), 1), common[pair] / max(len(tokens[reference]), 1)
        best[row] = np.maximum(best[row], shares)
    precision, recall = best.T
    weighted = divide((1 + ROUGE_BETA**2) * precision * recall, recall + ROUGE_BETA**2 * precision)
    return measure_mean(("ROUGE-L",), np.nan_to_num(weighted)[:, None])


def _common_length(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence, a bit of an integer for each token of `one` (Hyyrö 2004)."""
    if not one and not other:
        return 1  # COCO's split finds an empty word in each
    places: dict[str, int] = {}
    for position, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << position
    everywhere = (1 << len(one)) - 1
    row = everywhere
    for token in other:
        hits = row & places.get(token, 0)
        row = (row + hits | row - hits) & everywhere
    return len(one) - row.bit_count()


class Frequencies(NamedTuple):
    """In how many images' references each n-gram is."""

    images: int
    grams: list[tuple[np.ndarray, np.ndarray]]  # by order: hashes, sorted, and numbers of images


def count_documents(blocks: Iterable[References]) -> Frequencies:
    """The frequencies in all blocks together."""
    images, found = 0, [[] for _ in ORDERS]
    for references in blocks:
        images += references.size
        for order, grams in enumerate(references.texts.gram_counts):
            documents = np.bincount(references.most[order][0] % grams, minlength=grams)
            known = documents > 0
            hashes = references.texts.hashes[order]  # none, where no text is long enough
            found[order].append((hashes[known[: len(hashes)]], documents[known]))
    grams = []
    for parts in found:
        hashes, place = np.unique(np.concatenate([hashes for hashes, _ in parts]), return_inverse=True)
        grams.append((hashes, np.bincount(place, np.concatenate([counts for _, counts in parts]), len(hashes))))
    return Frequencies(images, grams)


def measure_cider(references: References, predictions: Sequence[str], frequencies: Frequencies | None = None) -> Metric:
    """Mean CIDEr-D, 0 to 10 (Vedantam et al. 2015): sigma 6, clipped; document frequencies, if not given, from these
    references.

    As in pycocoevalcap, lengths are counted in bigrams. One caption alone scores 0: its n-grams are in every document.
    """
    frequencies = frequencies or count_documents([references])
    texts, predicted = references.texts, references.texts.find(predictions)[references.pair_row]
    lengths = np.maximum(texts.lengths - 1, 0)
    delta = lengths[predicted] - lengths[references.pair_text]
    similarity = np.zeros(len(predicted))
    for order, grams in enumerate(texts.gram_counts):
        documents = _look_up(texts.hashes[order], *frequencies.grams[order])  # (grams,)
        rarity = math.log(frequencies.images) - np.log(np.maximum(documents, 1))
        every = texts.entries[order]
        norms = np.sqrt(np.bincount(every.row, (every.count * rarity[every.gram]) ** 2, len(texts.lengths)))
        said, there = texts.expand(order, predicted), texts.expand(order, references.pair_text)
        weight = _look_up(said.row * grams + said.gram, there.row * grams + there.gram, there.count) * rarity[said.gram]
        product = np.minimum(said.count * rarity[said.gram], weight) * weight
        dots = np.bincount(said.row, product, len(predicted))
        norm = norms[predicted] * norms[references.pair_text]
        similarity += np.where(norm > 0, dots / np.where(norm > 0, norm, 1), dots)
    similarity *= np.exp(-(delta**2) / (2 * CIDER_SIGMA**2)) * 10 / len(ORDERS)
    counts = np.bincount(references.pair_row, minlength=references.size)
    means = np.bincount(references.pair_row, similarity, references.size) / counts
    return measure_mean(("CIDEr-D",), means[:, None])


def measure_meteor(references: References, predictions: Sequence[str]) -> Metric | None:
    """Mean METEOR, 0 to 1 (Banerjee and Lavie 2005), nltk's; None where WordNet's data is not installed.

    Not COCO's METEOR 1.5, whose weights and paraphrases (Denkowski and Lavie 2014) nltk does not have.
    """
    from nltk.corpus import wordnet
    from nltk.translate.meteor_score import single_meteor_score

    try:
        wordnet.ensure_loaded()
    except LookupError:
        return None
    predicted, tokens = references.texts.find(predictions), references.texts.tokens
    score = functools.cache(lambda one, other: single_meteor_score(tokens[other], tokens[one], **METEOR_WEIGHTS))
    best = np.zeros(references.size)
    for row, reference in zip(references.pair_row.tolist(), references.pair_text.tolist(), strict=True):
        best[row] = max(best[row], score(int(predicted[row]), reference))
    return measure_mean(("METEOR",), best[:, None])


# --------------------------------------------------------------------------------------------------------------
# scores of one group


def score_bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Corpus BLEU-1 to BLEU-4, 0 to 1, on COCO tokens."""
    return score(measure_bleu(References(references, predictions, tokenize_coco), predictions))


def score_each_by_cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, 0 to 10; their mean is that of all."""
    blocks, frequencies = split_blocks(references)
    scores = []
    for block in blocks:
        known = References(references[block], predictions[block], tokenize_coco)
        scores += measure_cider(known, predictions[block], frequencies).statistics[:, 0].tolist()
    return scores


def score(metric: Metric) -> dict[str, float]:
    """The scores of all captions together."""
    return dict(zip(metric.names, metric.score(metric.statistics.sum(axis=0)).tolist(), strict=True))


def measure_texts(references: Sequence[Sequence[str]], sets: dict[str, Sequence[str]]) -> dict[str, dict[str, Metric]]:
    """{name of a set of predictions: {group: Metric}} of several sets for the same references."""
    blocks, frequencies = split_blocks(references)
    parts = [
        measure_block(references[block], {name: texts[block] for name, texts in sets.items()}, frequencies)
        for block in blocks
    ]
    return {
        name: {
            group: metric._replace(statistics=np.concatenate([part[name][group].statistics for part in parts]))
            for group, metric in groups.items()
        }
        for name, groups in parts[0].items()
    }


def split_blocks(references: Sequence[Sequence[str]]) -> tuple[list[slice], Frequencies | None]:
    """Where captions are cut into blocks, and the document frequencies of all; None: those of the only block."""
    blocks = [slice(start, start + BLOCK) for start in range(0, len(references), BLOCK)]
    if len(blocks) == 1:
        return blocks, None
    return blocks, count_documents(References(references[block], [], tokenize_coco) for block in blocks)


def measure_block(
    references: Sequence[Sequence[str]], sets: dict[str, Sequence[str]], frequencies: Frequencies | None
) -> dict[str, dict[str, Metric]]:
    """The same of captions that are in memory together; `frequencies` are those of all."""
    every, measured = list(itertools.chain.from_iterable(sets.values())), {}
    known = References(references, every, tokenize_spaces)
    reference_bleu = {name: measure_reference_bleu(known, predictions) for name, predictions in sets.items()}
    known = References(references, every, tokenize_coco)  # in place of the others, as there may be no room for both
    for name, predictions in sets.items():
        groups = {
            "corpus_bleu": measure_bleu(known, predictions),
            "reference_bleu": reference_bleu[name],
            "rouge_l": measure_rouge(known, predictions),
            "cider_d": measure_cider(known, predictions, frequencies),
            "meteor": measure_meteor(known, predictions),
        }
        measured[name] = {group: metric for group, metric in groups.items() if metric is not None}
    return measured


def make_signature(**facts) -> str:
    """One line that says how a score came about, in the manner of sacrebleu."""
    facts |= {"nltk": nltk.__version__}
    return "|".join(f"{name}:{value}" for name, value in facts.items())
