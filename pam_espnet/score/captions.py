"""Caption scores against several references: CIDEr-D, ROUGE-L and BLEU here; METEOR, SPICE, SPIDEr and FENSE where the
parts they need are installed (``metrics/parts.py``). What could not be computed is named with the reason.

CIDEr-D is written from Vedantam, Zitnick and Parikh, "CIDEr: Consensus-based Image Description Evaluation" (CVPR
2015), section 5. ROUGE-L follows the caption convention (the best precision and the best recall over the references,
F with beta = 1.2); `rouge-score` from the registry differs in all three (best single F, beta 1, own tokens), and
`pycocoevalcap` brings Java archives and a compiled COCO reader for fifteen lines of dynamic programming.

On equal tokens they agree with pycocoevalcap 1.2 (tests/metrics hold figures measured with it). Tokens differ a
little: published figures come from Stanford's PTBTokenizer (Java), here a regular expression lowers the case, drops
punctuation and splits clitics ("dog 's", "does n't"). Known differences: signs such as & % # / and brackets are
dropped here and kept there; "cannot" and "gonna" stay one word here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from pam_espnet.score.bleu import MAX_ORDER, Bleu, count_matches
from pam_espnet.score.fense import fense
from pam_espnet.score.intervals import Statistics, mean_of
from pam_espnet.score.meteor import meteor
from pam_espnet.score.parts import UnavailableError
from pam_espnet.score.result import TaskResult
from pam_espnet.score.spice import spice

SIGMA = 6.0  # words; width of CIDEr-D's length penalty
BETA = 1.2  # weight of recall against precision in ROUGE-L

_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")
_TOKEN = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?:[-.,']\w+)*")

Ngrams = Counter[tuple[str, ...]]


def tokenize(text: str) -> list[str]:
    """Lower-case words without punctuation; inner hyphens, decimal points and apostrophes stay."""
    text = text.lower().replace("’", "'")
    return _TOKEN.findall(_CLITIC.sub(r" \1", text))


def _ngrams(tokens: Sequence[str]) -> Ngrams:
    """Counts of all n-grams, n from 1 to 4."""
    return Counter(
        tuple(tokens[start : start + order])
        for order in range(1, MAX_ORDER + 1)
        for start in range(len(tokens) - order + 1)
    )


class CiderD:
    """CIDEr-D with the document frequencies of one set of references.

    An n-gram's document frequency is the number of utterances that use it in at least one reference; it is fixed here,
    once, from the whole test set. With a single utterance every weight is log(1) = 0 and so is every score.

    Args:
        references: per utterance, the tokens of each of its references.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[str]]]) -> None:
        self._documents = len(references)
        self._frequency = Counter(
            gram for sentences in references for gram in set().union(*(_ngrams(tokens) for tokens in sentences))
        )

    def _vector(self, tokens: Sequence[str]) -> tuple[list[dict[tuple[str, ...], float]], list[float]]:
        """Per order: n-gram -> count times inverse document frequency, and the Euclidean norm."""
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(MAX_ORDER)]
        for gram, count in _ngrams(tokens).items():
            # A hypothesis may use an n-gram that no reference has: frequency 0 counts as 1.
            inverse = math.log(self._documents / max(1, self._frequency[gram]))
            weights[len(gram) - 1][gram] = count * inverse
        return weights, [math.sqrt(sum(value * value for value in weight.values())) for weight in weights]

    def score(self, hypothesis: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """Mean over references and n of the clipped cosine times the length penalty, times 10; in [0, 10]."""
        said, said_norm = self._vector(hypothesis)
        total = 0.0
        for reference in references:
            meant, meant_norm = self._vector(reference)
            penalty = math.exp(-((len(hypothesis) - len(reference)) ** 2) / (2 * SIGMA**2))
            for order in range(MAX_ORDER):
                norm = said_norm[order] * meant_norm[order]
                if norm:
                    shared = (
                        min(value, meant[order].get(gram, 0.0)) * meant[order].get(gram, 0.0)
                        for gram, value in said[order].items()
                    )
                    total += penalty * sum(shared) / norm
        return 10.0 * total / (MAX_ORDER * len(references))


def _common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    best = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for column, other in enumerate(right, start=1):
            above = best[column]
            best[column] = diagonal + 1 if word == other else max(above, best[column - 1])
            diagonal = above
    return best[-1]


def rouge_l(hypothesis: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """F (beta 1.2) of the best precision and the best recall over the references; in [0, 1], 0 for nothing said."""
    if not hypothesis:
        return 0.0
    common = [(_common_subsequence(hypothesis, reference), len(reference)) for reference in references]
    precision = max(length / len(hypothesis) for length, _ in common)
    recall = max(length / total if total else 0.0 for length, total in common)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def score_captions(references: Mapping[str, Sequence[str]], hypotheses: Mapping[str, str]) -> TaskResult:
    """All caption scores that can be computed here, over the utterances of ``references``.

    Args:
        references: utterance -> its reference captions, at least one (five in the usual test sets).
        hypotheses: utterance -> decoded caption, for at least the same utterances.

    Returns:
        ``details["not_computed"]``: metric -> why; with what to type.

    Raises:
        ValueError: an utterance without a reference.
    """
    keys = list(references)
    for key in keys:
        if not references[key]:
            raise ValueError(f"{key} has no reference caption")
    meant = [[tokenize(caption) for caption in references[key]] for key in keys]
    said = [tokenize(hypotheses[key]) for key in keys]
    cider = CiderD(meant)
    per_utterance = Counter(len(sentences) for sentences in meant)
    cider_d = [cider.score(*pair) for pair in zip(said, meant, strict=True)]
    counts = np.array([count_matches(*pair) for pair in zip(said, meant, strict=True)], dtype=np.float64)
    metrics: dict[str, Statistics] = {
        "cider_d": mean_of(cider_d),
        "rouge_l": mean_of([rouge_l(*pair) for pair in zip(said, meant, strict=True)]),
        **{f"bleu_{order}": Bleu.of(counts, order) for order in range(1, MAX_ORDER + 1)},
    }
    not_computed: dict[str, str] = {}
    try:
        metrics["meteor"] = meteor(said, meant)
    except UnavailableError as error:
        not_computed["meteor"] = str(error)
    try:
        scenes = spice(said, meant)
        metrics["spice"] = mean_of(scenes)
        metrics["spider"] = mean_of([(left + right) / 2 for left, right in zip(cider_d, scenes, strict=True)])
    except UnavailableError as error:
        not_computed["spice"] = str(error)
        not_computed["spider"] = "it is the mean of CIDEr-D and SPICE"
    try:
        metrics["fense"] = mean_of(fense([hypotheses[key] for key in keys], [references[key] for key in keys]))
    except UnavailableError as error:
        not_computed["fense"] = str(error)
    return TaskResult(
        keys,
        metrics=metrics,
        details={
            "references_per_utterance": {str(count): utts for count, utts in sorted(per_utterance.items())},
            "empty_hypotheses": sum(not tokens for tokens in said),
            "distinct_hypotheses": len({tuple(tokens) for tokens in said}),
            "tokenizer": "lower-case words without punctuation, clitics split (metrics/captions.py)",
            "not_computed": not_computed,
        },
    )
