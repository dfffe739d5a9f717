"""Early exit: when may a token be taken from an intermediate block, through the LLM's own final norm and output layer?

Early exit is a natural capability of decoder-only LLMs (Shan et al., arXiv 2412.01455): no head is added, the hard part
is to know at which block. One decision is made per step and utterance, from the row of its best hypothesis, so that
the hypotheses that compete within a step are scored at the same depth; an utterance's decision looks at its own row.

Measures of a block's row, before the threshold:

confidence  the largest softmax probability (Schuster et al., CALM, NeurIPS 2022)
entropy     one minus the entropy of the softmax over its largest value, log V, so that more is surer, as above
patience    so many candidate blocks in a row name the same token (Zhou et al., PABEE, NeurIPS 2020); no threshold

B utterances, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pam_espnet.errors import ConfigError

MODES = ("never", "fixed", "confidence", "entropy", "patience")


@dataclass(frozen=True)
class ExitOptions:
    """When to leave.

    Attributes:
        mode: never, fixed (always at the first of ``layers``), confidence, entropy or patience.
        layers: candidate blocks, counted from 1 (after the first block) to one less than the LLM has.
        threshold: of confidence and entropy, 0 to 1.
        patience: number of neighbouring candidates that must agree.
    """

    mode: str = "never"
    layers: tuple[int, ...] = ()
    threshold: float = 0.9
    patience: int = 2

    def __post_init__(self) -> None:
        """Raises ConfigError, naming the option."""
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        if self.mode not in MODES:
            raise ConfigError(f"exit.mode: {self.mode!r}; choose one of {', '.join(MODES)}")
        if self.mode != "never" and not self.layers:
            raise ConfigError(f"exit.layers: {self.mode} needs candidate blocks")
        if self.layers and self.layers[0] < 1:
            raise ConfigError(f"exit.layers: {list(self.layers)}; blocks count from 1")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"exit.threshold: {self.threshold}; must be 0 to 1")
        if self.patience < 2 or (self.mode == "patience" and self.patience > len(self.layers)):
            raise ConfigError(f"exit.patience: {self.patience}; must be 2 to the number of candidate blocks")


class ExitPolicy:
    """Decides at every candidate block of a step.

    Args:
        options: see ``ExitOptions``.
        num_layers: of the LLM.
        head: hidden states of any block (...,D) -> float32 logits (...,V).

    Raises:
        ConfigError: a candidate block that the LLM does not have, or its last one.
    """

    def __init__(self, options: ExitOptions, num_layers: int, head: Callable[[Tensor], Tensor]) -> None:
        if options.layers and options.layers[-1] >= num_layers:
            raise ConfigError(f"exit.layers: {options.layers[-1]}; must be below {num_layers}, the LLM's last block")
        self.options, self.head = options, head
        self.layers: Sequence[int] = options.layers[:1] if options.mode == "fixed" else options.layers
        self._named = torch.empty(0, dtype=torch.long)  # (B,) token that each utterance's last candidate named
        self._agreed = torch.empty(0, dtype=torch.long)  # (B,) how many candidates in a row have named it

    def begin(self, utterances: int, device: torch.device) -> None:
        """A step of ``utterances`` begins."""
        self._named = torch.full((utterances,), -1, device=device)
        self._agreed = torch.zeros(utterances, dtype=torch.long, device=device)

    def leave(self, utterances: Tensor, hidden: Tensor) -> Tensor:
        """Who leaves at this candidate block.

        Args:
            utterances: (B',) those that are still under way.
            hidden: (B',D) the block's output at the row of each one's best hypothesis.

        Returns:
            (B',) bool.
        """
        options = self.options
        if options.mode == "fixed":
            return torch.ones(len(utterances), dtype=torch.bool, device=hidden.device)
        logits = self.head(hidden)
        if options.mode == "patience":
            named = logits.argmax(dim=-1)
            same = named == self._named[utterances]
            self._agreed[utterances] = torch.where(same, self._agreed[utterances] + 1, 1)
            self._named[utterances] = named
            return self._agreed[utterances] >= options.patience
        log_probs = logits.log_softmax(dim=-1)
        if options.mode == "confidence":
            return log_probs.amax(dim=-1).exp() >= options.threshold
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
        return 1 - entropy / math.log(log_probs.size(-1)) >= options.threshold
