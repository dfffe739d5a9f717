"""The contract every fusion meets, and the two sums they share.

Dimension letters: B utterances, U adapter frames, M encoders, E experts, H layers, D width, P prompt-vector width.

A fusion works in two steps. ``route`` looks at the prompt alone, so that it is known before any audio is encoded
which encoders are worth running. ``forward`` then combines the adapted streams of those encoders. A fusion knows
nothing of encoders, waveforms or the LLM: it sees names, layer counts and tensors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pam_espnet.frontend.fusion.routing import Routing


class AbsFusion(nn.Module, ABC):
    """Combines the adapted streams of M encoders into one.

    Attributes:
        names: the encoders in the order of ``num_layers``, of the streams and of the routing.
        used: those whose stream this fusion can ever need.
        learns_encoder_weights: whether encoders compete for weight. Only then does a skip threshold mean anything:
            an encoder that a fusion combines by definition (average, concat, single) is never skipped.

    Args:
        num_layers: H_m for each encoder.
        width: D of the streams and of the result.
        prompt_width: P.
        names: one per encoder.
    """

    learns_encoder_weights = False

    def __init__(self, num_layers: Sequence[int], width: int, prompt_width: int, names: Sequence[str]) -> None:
        super().__init__()
        if not num_layers or len(num_layers) != len(names):
            raise ValueError(f"{len(num_layers)} layer counts for the encoders {list(names)}")
        self.num_layers = tuple(num_layers)
        self.width = width
        self.prompt_width = prompt_width
        self.names = tuple(names)
        self.used = self.names

    @abstractmethod
    def route(self, prompt_vector: Tensor) -> Routing:
        """Decide from the prompt vectors (B,P), float32, before any audio is seen."""

    @abstractmethod
    def forward(self, embeddings: Sequence[Tensor | None], routing: Routing) -> Tensor:
        """Combine M streams (B,U,D) into one (B,U,D); None stands for an encoder of weight zero in the whole batch."""

    def mixture_parameters(self) -> list[nn.Parameter]:
        """What decides how much of which encoder and layer is heard, apart from the networks behind it."""
        return [parameter for name, parameter in self.named_parameters() if name.startswith("layer_logits")]

    def unrouted(self, prompt_vector: Tensor, layer_weights: list[Tensor]) -> Routing:
        """The routing of a fusion without a router: one expert with probability one, and the same layer weights
        (H_m,) per encoder for every utterance."""
        ones = torch.ones(len(prompt_vector), 1, device=prompt_vector.device)
        expert = torch.zeros(len(prompt_vector), dtype=torch.long, device=prompt_vector.device)
        return Routing(None, ones, expert, ones, [weights.expand(len(prompt_vector), -1) for weights in layer_weights])


def weighted_sum(embeddings: Sequence[Tensor | None], encoder_weights: Tensor) -> Tensor:
    """Sum of streams (B,U,D) times their weights (B,M); absent streams count as zero."""
    terms = [
        encoder_weights[:, index, None, None] * stream for index, stream in enumerate(embeddings) if stream is not None
    ]
    return torch.stack(terms).sum(dim=0)


def balanced_logits(num_layers: Sequence[int]) -> Tensor:
    """Logits (sum of H_m,) whose softmax gives every encoder 1/M, shared evenly by its layers.

    All-zero logits would favour whichever encoder happens to have the most layers.
    """
    return torch.cat([torch.full((count,), -math.log(count)) for count in num_layers])
