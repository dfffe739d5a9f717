"""Early exit: when may a token be taken from an intermediate block, through the LLM's own final norm and output layer?

Early exit is a natural capability of decoder-only LLMs (Shan et al., arXiv 2412.01455): no head is added. One decision
is made per step and utterance, from the row of its best hypothesis alone, so that the hypotheses that compete within a
step are scored at the same depth. Skipped blocks store the keys and values that they make of the state that exited
(Schuster et al., CALM, NeurIPS 2022), for later steps.

Measures of a block's row, before the threshold:

confidence  the largest softmax probability (CALM)
entropy     one minus the entropy of the softmax over its largest value, log V, so that more is surer, as above
gate        the probability of a fitted gate (``engine.calibration``), which needs no output layer
patience    n neighbouring candidate blocks predict the same token (Zhou et al., PABEE, NeurIPS 2020); no threshold

B utterances, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pam_espnet.config import check_number
from pam_espnet.engine.calibration import Calibration
from pam_espnet.errors import ConfigError
from pam_espnet.llm.llm import LLM

MODES = ("never", "fixed", "confidence", "entropy", "gate", "patience")


@dataclass(frozen=True)
class ExitOptions:
    """When to exit.

    Attributes:
        mode: never, fixed (always at the first of ``layers``), confidence, entropy, gate or patience.
        layers: candidate blocks, counted from 1 (after the first block) to one less than the LLM has; a gate knows its
            own.
        threshold: 0 to 1; None is 0.9, or what the gate was calibrated to.
        patience: number of neighbouring candidates that must agree.
        calibration: file of ``bin/pam_calibrate_exit.py``; needed by gate. In the other modes its map, where it has
            one for the block, is applied all the same.
    """

    mode: str = "never"
    layers: tuple[int, ...] = ()
    threshold: float | None = None
    patience: int = 2
    calibration: str | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError, naming the option."""
        if isinstance(self.layers, int) or not all(isinstance(layer, int) for layer in self.layers):
            raise ConfigError(f"exit.layers: {self.layers!r}; must be a list of blocks")
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        if self.mode not in MODES:
            raise ConfigError(f"exit.mode: {self.mode!r}; choose one of {', '.join(MODES)}")
        if self.mode == "gate":
            if self.calibration is None or self.layers:
                raise ConfigError("exit: gate needs calibration, and takes its layers from there")
        elif self.mode != "never" and not self.layers:
            raise ConfigError(f"exit.layers: {self.mode} needs candidate blocks")
        if self.layers and self.layers[0] < 1:
            raise ConfigError(f"exit.layers: {list(self.layers)}; blocks count from 1")
        if self.threshold is not None and self.mode in ("fixed", "patience"):
            raise ConfigError(f"exit.threshold: {self.mode} has none; set it to null")
        if self.threshold is not None:
            check_number(self.threshold, "exit.threshold", at_least=0, at_most=1)
        most = len(self.layers) if self.mode == "patience" else math.inf
        if not isinstance(self.patience, int) or not 2 <= self.patience <= most:
            raise ConfigError(f"exit.patience: {self.patience}; must be 2 to the number of candidate blocks")


class ExitPolicy:
    """Decides at every candidate block of a step.

    Args:
        options: see ``ExitOptions``.
        num_layers: of the LLM.
        norm: the final norm, hidden states of any block (...,D) -> (...,D).
        head: the output layer, normed states (...,D) -> float32 logits (...,V).
        calibration: what ``options.calibration`` holds.

    Raises ConfigError: a candidate block that the LLM does not have, or its last one.
    """

    def __init__(
        self,
        options: ExitOptions,
        num_layers: int,
        norm: Callable[[Tensor], Tensor],
        head: Callable[[Tensor], Tensor],
        calibration: Calibration | None = None,
    ) -> None:
        self.options, self.norm, self.head, self.calibration = options, norm, head, calibration
        self.log_probs: Callable[[Tensor], Tensor] = partial(torch.log_softmax, dim=-1)  # of logits (...,V)
        self.layers: Sequence[int] = options.layers
        self.threshold: float | None = 0.9 if options.threshold is None else options.threshold
        if options.mode == "fixed":
            self.layers = options.layers[:1]
        elif options.mode == "gate" and calibration is not None:
            self.layers = calibration.layers
            self.threshold = calibration.threshold if options.threshold is None else options.threshold
        if self.layers and max(self.layers) >= num_layers:
            raise ConfigError(f"exit.layers: {max(self.layers)}; must be below {num_layers}, the LLM's last block")
        self._predicted = torch.empty(0, dtype=torch.long)  # (B,) token that each utterance's last candidate predicted
        self._agreed = torch.empty(0, dtype=torch.long)  # (B,) how many candidates in a row have predicted it

    @classmethod
    def of(
        cls, options: ExitOptions, llm: LLM, norm: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor]
    ) -> ExitPolicy:
        """With the calibration read from its file; CheckpointError as ``Calibration.load``."""
        calibration = None
        if options.calibration:
            calibration = Calibration.load(options.calibration, llm.width).to(llm.device, llm.dtype)
        return cls(options, llm.num_layers, norm, head, calibration)

    def begin(self, utterances: int, device: torch.device) -> None:
        """A step of ``utterances`` begins."""
        self._predicted = torch.full((utterances,), -1, device=device)
        self._agreed = torch.zeros(utterances, dtype=torch.long, device=device)

    def mapped(self, layer: int, hidden: Tensor) -> Tensor:
        """A block's hidden states (...,D), mapped towards the last block's where there is a map."""
        if self.calibration is None or layer not in self.calibration.layers:
            return hidden
        return self.calibration.mapped(layer, hidden)

    def decide(self, layer: int, utterances: Tensor, hidden: Tensor) -> Tensor:
        """Which utterances exit at a candidate block.

        Args:
            layer: the block.
            utterances: (B',) those that have not exited.
            hidden: (B',D) the block's output at the row of each one's best hypothesis.

        Returns:
            (B',) bool.
        """
        options = self.options
        if self.threshold is None or options.mode == "fixed":  # None: a calibration that found nothing worth it
            return torch.full((len(utterances),), options.mode == "fixed", device=hidden.device)
        if options.mode == "patience":
            predicted = self.head(self.norm(self.mapped(layer, hidden))).argmax(dim=-1)
            same = predicted == self._predicted[utterances]
            self._agreed[utterances] = torch.where(same, self._agreed[utterances] + 1, 1)
            self._predicted[utterances] = predicted
            return self._agreed[utterances] >= options.patience
        return self.measure(layer, hidden) >= self.threshold

    def measure(self, layer: int, hidden: Tensor) -> Tensor:
        """How sure a block is, (B',D) -> (B',): what gate, confidence and entropy compare with the threshold."""
        if self.options.mode == "gate" and self.calibration is not None:
            return self.calibration.probability(layer, self.norm(hidden))
        log_probs = self.log_probs(self.head(self.norm(self.mapped(layer, hidden))))
        if self.options.mode == "confidence":
            return log_probs.amax(dim=-1).exp()
        entropy = -_total(log_probs.exp() * log_probs)
        return 1 - entropy / math.log(log_probs.size(-1))


def _total(values: Tensor) -> Tensor:
    """The sum over the last dimension, neighbours first: in an order that the number of rows does not change."""
    while values.size(-1) > 1:
        pairs = values.size(-1) // 2
        odd, values = values[..., 1::2], values[..., ::2].clone()
        values[..., :pairs] += odd
    return values[..., 0]
