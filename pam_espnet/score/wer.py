"""Word and character error rate over a corpus, as given and after Whisper's English normaliser.

Errors are counted with jiwer (minimum edit distance), for each utterance, because an interval needs its counts. jiwer
splits words at single spaces only, so whitespace is collapsed before. An empty reference adds its hypothesis's words as
insertions and no reference words. The character error rate counts the space between two words as a character.

"As given" changes nothing but whitespace: letter case and punctuation count as errors. Before the normaliser, the same
words in other characters are made the same (``score/characters.py``).
"""

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jiwer
import numpy as np

from pam_espnet.score.characters import plain
from pam_espnet.score.intervals import Ratio
from pam_espnet.score.result import TaskResult

LOOP_TIMES = 4
WORST = 10
# Beginnings of answers in which an LLM declines: about the request and not about the audio.
_UNABLE = r"(can['’]?t|cannot|can not|am unable to|am not able to|don['’]?t have|do not have)"
REFUSAL = re.compile(
    rf"(i['’]?m (very |so )?sorry,? but |i am sorry,? but |sorry,? but |unfortunately,? )?i {_UNABLE} .{{0,60}}"
    r"\b(audio|transcri\w*|hear|listen|access|help|assist|provide)\b"
    r"|(i['’]?m (very |so )?sorry,? but |sorry,? but )?(as an ai\b|as a (large )?language model\b)"
    r"|i['’]m (unable|not able) to |(please|could you( please)?) (provide|upload|share) ",
    re.IGNORECASE,
)


def normaliser_record() -> dict[str, str]:
    """Name and version of the normaliser behind the ``*_normalised`` figures."""
    package = "whisper-normalizer"
    return {"name": "EnglishTextNormalizer", "package": package, "version": version(package), "characters": "NFKC"}


def _normalise(texts: Sequence[str]) -> list[str]:
    from whisper_normalizer.english import EnglishTextNormalizer

    normalise = EnglishTextNormalizer()
    return [normalise(plain(text)) for text in texts]


def count_errors(references: Sequence[str], hypotheses: Sequence[str], unit: str = "words") -> np.ndarray:
    """Substitutions, deletions, insertions and reference length of each pair, integers (N,4).

    ``unit``: words or characters.
    """
    process = jiwer.process_words if unit == "words" else jiwer.process_characters
    rows = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        found = process(" ".join(reference.split()), " ".join(hypothesis.split()))
        rows.append([found.substitutions, found.deletions, found.insertions, len(found.references[0])])
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def has_loop(text: str) -> bool:
    """Whether some n-gram of words, of any n, is there ``LOOP_TIMES`` or more times in a row."""
    words = text.split()
    for size in range(1, len(words) // LOOP_TIMES + 1):
        run = 0
        for left, right in zip(words, words[size:], strict=False):
            run = run + 1 if left == right else 0
            if run >= size * (LOOP_TIMES - 1):
                return True
    return False


def is_refusal(text: str) -> bool:
    """Whether ``text`` begins as an LLM's refusal does ("I'm sorry, but I can't listen to audio")."""
    return REFUSAL.match(text.strip()) is not None


def align(reference: str, hypothesis: str) -> str:
    """Reference, hypothesis and a line of S, D, I under one another, as text."""
    output = jiwer.process_words(" ".join(reference.split()), " ".join(hypothesis.split()))
    lines = jiwer.visualize_alignment(output, show_measures=False).splitlines()
    return "\n".join(line.rstrip() for line in lines if line.strip() and not line.startswith("==="))


def score_wer(references: Mapping[str, str], hypotheses: Mapping[str, str]) -> TaskResult:
    """WER and CER in percent, raw and normalised, over the utterances of ``references``.

    ``details``: loops and refusals (those that the reference has too are not counted), empty texts, and the worst
    utterances, aligned. An empty hypothesis is all deletions.
    """
    keys = list(references)
    raw = [references[key] for key in keys], [hypotheses[key] for key in keys]
    clean = _normalise(raw[0]), _normalise(raw[1])
    result = TaskResult(keys, {})
    for unit, figure in (("words", "wer"), ("characters", "cer")):
        for name, texts in ((figure, raw), (f"{figure}_normalised", clean)):
            table = count_errors(*texts, unit)
            result.metrics[name] = Ratio(table[:, :3].sum(1), table[:, 3], scale=100.0)
            counts = table.sum(0).tolist()
            result.fields[name] = dict(zip(("substitutions", "deletions", "insertions", unit), counts, strict=True))
    pairs = list(zip(keys, *raw, strict=True))
    loops = [key for key, reference, hypothesis in pairs if has_loop(hypothesis) and not has_loop(reference)]
    refusals = [key for key, reference, hypothesis in pairs if is_refusal(hypothesis) and not is_refusal(reference)]
    result.details = {
        "loops": len(loops),
        "loop_utterances": loops,
        "refusals": len(refusals),
        "refusal_utterances": refusals,
        "empty_hypotheses": sum(not hypothesis.strip() for _, _, hypothesis in pairs),
        "empty_references": sum(not reference.strip() for _, reference, _ in pairs),
        "worst": _worst(pairs, result.metrics["wer"].table),
    }
    return result


def _worst(pairs: Sequence[tuple[str, str, str]], table: np.ndarray) -> list[dict[str, Any]]:
    """The utterances with the most word errors, at most ten, none without an error; ``table`` has errors and words."""
    worst = []
    for row in sorted(range(len(pairs)), key=lambda row: (-table[row, 0], pairs[row][0]))[:WORST]:
        if table[row, 0]:
            utt, *texts = pairs[row]
            counts = {"errors": int(table[row, 0]), "words": int(table[row, 1])}
            worst.append({"utt": utt, **counts, "alignment": align(*texts)})
    return worst
