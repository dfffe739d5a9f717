"""Caption scores against several references: CIDEr-D, ROUGE-L and BLEU here; METEOR, SPICE, SPIDEr and FENSE where the
parts they need are installed (``score/parts.py``). What could not be computed is listed with the reason.

CIDEr-D is written from Vedantam, Zitnick and Parikh, "CIDEr: Consensus-based Image Description Evaluation" (CVPR
2015), section 5. ROUGE-L follows the caption convention (the best precision and the best recall over the references,
F with beta = 1.2); `rouge-score` differs in all three, and `pycocoevalcap` brings a compiled COCO reader.

On equal tokens they agree with pycocoevalcap 1.2 (tests/score hold figures measured with it). Published figures come
from Stanford's PTBTokenizer (Java); here a regular expression lowers the case, drops punctuation and splits clitics
("dog 's", "does n't"). Differences: signs such as & % # / and brackets are dropped here; "cannot" stays one word.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from rapidfuzz.distance import LCSseq

from pam_espnet.score.bleu import MAX_ORDER, Bleu, count_matches, ngrams
from pam_espnet.score.characters import plain
from pam_espnet.score.fense import fense
from pam_espnet.score.intervals import Ratio, Statistics, mean_of, value_of
from pam_espnet.score.meteor import meteor
from pam_espnet.score.parts import UnavailableError
from pam_espnet.score.result import TaskResult
from pam_espnet.score.spice import spice

SIGMA = 6.0  # words; width of CIDEr-D's length penalty
BETA = 1.2  # weight of recall against precision in ROUGE-L

_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")
_TOKEN = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?:[-.,']\w+)*")


def tokenize(text: str) -> list[str]:
    """Lower-case words without punctuation; inner hyphens, decimal points and apostrophes stay."""
    return _TOKEN.findall(_CLITIC.sub(r" \1", plain(text).lower()))


class CiderD:
    """CIDEr-D with the document frequencies of one set of references.

    An n-gram's document frequency is the number of utterances that use it in at least one of their references (given
    as tokens), fixed for the whole set. With a single utterance every weight is log(1) = 0: the score means nothing.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[str]]]) -> None:
        self._documents = len(references)
        self._frequency = Counter(
            gram for sentences in references for gram in set().union(*(ngrams(tokens) for tokens in sentences))
        )

    def _vector(self, tokens: Sequence[str]) -> tuple[list[dict[tuple[str, ...], float]], list[float]]:
        """Per order: n-gram -> count times inverse document frequency, and the Euclidean norm."""
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(MAX_ORDER)]
        for gram, count in ngrams(tokens).items():
            # A hypothesis may use an n-gram that no reference has: frequency 0 counts as 1.
            inverse = math.log(self._documents / max(1, self._frequency[gram]))
            weights[len(gram) - 1][gram] = count * inverse
        return weights, [math.sqrt(sum(value * value for value in weight.values())) for weight in weights]

    def score(self, hypothesis: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """Mean over references and n of the clipped cosine times the length penalty, times 10; in [0, 10]."""
        given, given_norm = self._vector(hypothesis)
        total = 0.0
        for reference in references:
            wanted, wanted_norm = self._vector(reference)
            penalty = math.exp(-((len(hypothesis) - len(reference)) ** 2) / (2 * SIGMA**2))
            for order in range(MAX_ORDER):
                norm = given_norm[order] * wanted_norm[order]
                if norm:
                    shared = (
                        min(value, wanted[order].get(gram, 0.0)) * wanted[order].get(gram, 0.0)
                        for gram, value in given[order].items()
                    )
                    total += penalty * sum(shared) / norm
        return 10.0 * total / (MAX_ORDER * len(references))


def rouge_l(hypothesis: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """F (beta 1.2) of the best precision and the best recall over the references; in [0, 1], 0 for no words."""
    if not hypothesis:
        return 0.0
    common = [(LCSseq.similarity(hypothesis, reference), len(reference)) for reference in references]
    precision = max(length / len(hypothesis) for length, _ in common)
    recall = max(length / total if total else 0.0 for length, total in common)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _spider(metrics: Mapping[str, Statistics]) -> Statistics:
    if "spice" not in metrics or value_of(metrics["cider_d"]) is None:
        raise UnavailableError("it is the mean of CIDEr-D and SPICE")
    return mean_of((metrics["cider_d"].table[:, 0] + metrics["spice"].table[:, 0]) / 2)


def score_captions(references: Mapping[str, Sequence[str]], hypotheses: Mapping[str, str]) -> TaskResult:
    """All caption scores that can be computed here, over the utterances of ``references``, each with one or more.

    ``details["not_computed"]``: metric -> why, and what to type. ValueError: an utterance without a reference.
    """
    keys = list(references)
    if empty := [key for key in keys if not references[key]]:
        raise ValueError(f"{empty[0]} has no reference caption")
    wanted = [[tokenize(caption) for caption in references[key]] for key in keys]
    given = [tokenize(hypotheses[key]) for key in keys]
    pairs = list(zip(given, wanted, strict=True))
    per_utterance = Counter(len(sentences) for sentences in wanted)
    cider = CiderD(wanted)
    cider_d = [cider.score(*pair) for pair in pairs]
    counts = np.array([count_matches(*pair) for pair in pairs], dtype=np.float64)
    metrics: dict[str, Statistics] = {"cider_d": mean_of(cider_d), "rouge_l": mean_of([rouge_l(*p) for p in pairs])}
    not_computed: dict[str, str] = {}
    if len(keys) < 2:
        metrics["cider_d"] = Ratio(np.zeros(len(keys)), np.zeros(len(keys)))  # undefined
        not_computed["cider_d"] = "its document frequencies need two clips or more"
    longest = max(len(tokens) for sentences in wanted for tokens in sentences)
    for order in range(1, MAX_ORDER + 1):
        if order <= longest:
            metrics[f"bleu_{order}"] = Bleu.of(counts, order)
        else:
            not_computed[f"bleu_{order}"] = f"no reference has {order} words"
    optional: dict[str, Callable[[], Statistics]] = {
        "meteor": lambda: meteor(given, wanted),
        "spice": lambda: mean_of(spice(given, wanted)),
        "spider": lambda: _spider(metrics),
        "fense": lambda: mean_of(fense([hypotheses[key] for key in keys], [references[key] for key in keys])),
    }
    for name, compute in optional.items():
        try:
            metrics[name] = compute()
        except UnavailableError as error:
            not_computed[name] = str(error)
    details = {
        "references_per_utterance": {str(count): utts for count, utts in sorted(per_utterance.items())},
        "empty_hypotheses": sum(not tokens for tokens in given),
        "distinct_hypotheses": len({tuple(tokens) for tokens in given}),
        "tokenizer": "lower-case words without punctuation, clitics split (score/captions.py)",
        "not_computed": not_computed,
    }
    return TaskResult(keys, metrics, details=details)
