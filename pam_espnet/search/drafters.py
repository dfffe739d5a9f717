"""Where drafts come from: another answer to the same question.

Pure Python over token ids: no tensors, no LLM, no text. Early exit is no drafter here: a guess from block k of H,
through an output layer that weighs as much as h blocks, costs (k + h) / (H + h) of the pass that it may save, so it
must be right more often than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pam_espnet.config import LAST_COMMIT
from pam_espnet.errors import ConfigError

KINDS = ("none", "ctc")


@dataclass(frozen=True)
class DraftOptions:
    """Who drafts.

    Attributes:
        kind: none; or ctc, the head that the warm start leaves, for tasks that it was fitted to with CTC (the others
            get no drafts).
        most: tokens per draft.
    """

    kind: str = "none"
    most: int = 8

    def __post_init__(self) -> None:
        """Raises ConfigError, naming the option."""
        if self.kind == "ngram":
            raise ConfigError(f"draft.kind: ngram is no longer supported; the last commit that had it is {LAST_COMMIT}")
        if self.kind not in KINDS:
            raise ConfigError(f"draft.kind: {self.kind!r}; choose one of {', '.join(KINDS)}")
        if not isinstance(self.most, int) or self.most < 1:
            raise ConfigError(f"draft.most: {self.most!r}; must be a whole number, at least 1")


class NoDraft:
    """Leaves an utterance to plain greedy search."""

    name = "none"

    def propose(self, utterance: int, answer: Sequence[int], most: int) -> Sequence[int]:
        """See ``search.drafting.Drafter``."""
        return ()


class WholeAnswer:
    """A draft of the whole answer, made in advance, for instance by a CTC head.

    Where the LLM has said something else, the draft goes on behind its beginning that is the fewest edits
    (substitutions, insertions, deletions; Levenshtein) away from the answer so far. Among several of the same distance
    one that ends in the answer's last token is preferred, then the longest, which takes an odd token for a substitute
    of the drafted one rather than for an addition to it.

    Args:
        drafts: of each utterance.
        name: in reports.
    """

    def __init__(self, drafts: Sequence[Sequence[int]], name: str) -> None:
        self.name = name
        self.drafts = drafts
        # Last row of the table of edit distances, from the answer's first ``read`` tokens to each beginning of a draft.
        self._read = [0] * len(drafts)
        self._distance = [list(range(len(draft) + 1)) for draft in drafts]

    def propose(self, utterance: int, answer: Sequence[int], most: int) -> Sequence[int]:
        """See ``search.drafting.Drafter``."""
        draft, distance = self.drafts[utterance], self._distance[utterance]
        for token in answer[self._read[utterance] :]:
            row = [distance[0] + 1]
            for at, drafted in enumerate(draft):
                row.append(min(distance[at] + (token != drafted), distance[at + 1] + 1, row[at] + 1))
            distance = row
        self._read[utterance], self._distance[utterance] = len(answer), distance
        last = answer[-1] if answer else None

        def fit(length: int) -> tuple[int, bool, int]:
            return distance[length], not (length and draft[length - 1] == last), -length

        best = min(range(len(draft) + 1), key=fit) if answer else 0
        return draft[best : best + most]
