"""Encoders drawn at random, one for each utterance, in the first steps of the warm start (``single_steps``).

Where encoders compete and the mixture is fitted to held-out utterances (``held_out_every``), what each encoder makes of
these also says how often it is drawn for a task, and the weights with which mixing begins.

Dimension letters: M encoders.
"""

import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pam_espnet.model import ESPnetPaMModel
from pam_espnet.train.warm_losses import by_expert, encoder_weights
from pam_espnet.train.warm_options import WarmStartOptions


class EncoderDraws:
    """Draws that depend on seed, step and utterance alone, so that a resumed run repeats them.

    Args:
        valid: ``PaMIterFactory`` of the held-out utterances.
        priors: of tasks, see ``warm_losses.warm_loss``.
    """

    def __init__(
        self,
        model: ESPnetPaMModel,
        valid: Any,
        options: WarmStartOptions,
        seed: int,
        priors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.valid, self.losses, self.seed, self.priors = model, valid, options.losses, seed, priors
        self.steps, self.fusion = options.single_steps, model.frontend.fusion
        held_out = options.held_out_every > 0 and bool(self.fusion.mixture_parameters())
        self.competing = held_out and self.steps > 0 and self.fusion.learns_encoder_weights
        self.chances: dict[int, list[float]] = {}  # index of the task -> of the encoders (M); others are equally likely

    def update(self, step: int) -> None:
        """New chances, at the start of an epoch."""
        self.chances = {}
        if self.competing and 0 < step < self.steps:
            # An encoder that is ahead on a task gets more of its utterances: on the others most would be lost.
            for (_, task), weights in self._held_out_weights().items():
                self.chances[task] = weights.square().tolist()
                logging.info(f"step {step}, {self.model.tasks[task]}: {self._shares(weights)}")

    def draw(self, keys: Sequence[str], batch: Mapping[str, Any], step: int) -> list[str] | None:
        """The encoder of each utterance of a batch; None: they are mixed by now."""
        if step >= self.steps:
            return None
        pairs = zip(keys, batch["task"], strict=True)
        draws = ((random.Random(f"{self.seed} {step} {utt}"), self.chances.get(task)) for utt, task in pairs)
        return [one.choices(self.fusion.used, chances)[0] for one, chances in draws]

    def begin_mixing(self, step: int) -> None:
        """The weights of encoders from held-out losses, before the first step that mixes."""
        if self.competing and step == self.steps:
            for expert, weights in by_expert(self._held_out_weights()).items():
                self.fusion.set_encoder_weights(expert, weights)
                logging.info(f"step {step}, expert {expert}: {self._shares(weights)}")

    def _held_out_weights(self) -> dict[tuple[int, int], Tensor]:
        """``encoder_weights`` on the validation set. The state of random numbers stays, so that a resumed run sees what
        an unbroken one does."""
        state = torch.get_rng_state()
        self.model.eval()
        found = encoder_weights(self.model, self.valid.build_iter(1), self.losses, self.priors)
        self.model.train()
        torch.set_rng_state(state)
        return found

    def _shares(self, weights: Tensor) -> str:
        return ", ".join(f"{name} {w:.2f}" for name, w in zip(self.model.frontend.names, weights.tolist(), strict=True))
