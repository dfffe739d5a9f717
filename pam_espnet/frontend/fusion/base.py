"""The contract every fusion meets, and what several of them share.

Dimension letters: B utterances, U adapter frames, M encoders, E experts, H layers, D width, P prompt-vector width.

A fusion works in two steps. ``route`` reads the prompt alone, so that it is known before any audio is encoded which
encoders are worth running. ``forward`` then combines the adapted streams of those encoders. A fusion is independent of
encoders, waveforms and the LLM: it gets names, layer counts and tensors.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pam_espnet.frontend.fusion.routing import Routing


@dataclass(frozen=True)
class FusionInputs:
    """What every fusion is built for."""

    num_layers: tuple[int, ...]  # H_m for each encoder
    width: int  # D of the streams and of the result
    prompt_width: int  # P
    names: tuple[str, ...]  # one per encoder


class AbsFusion(nn.Module, ABC):
    """Combines the adapted streams of M encoders into one.

    Attributes:
        num_layers: H_m for each encoder, in the order of the streams and of the routing.
        used: names of the encoders whose stream this fusion can ever need.
        learns_encoder_weights: whether encoders compete for weight. Only then does a skip threshold mean anything:
            an encoder that a fusion combines by definition (average, concat, single) is never skipped.
        num_experts: E, of which the routing chooses one for each prompt; 1 without a router.
        router_held: whether the router stays as it is; it then gets no gradient.
    """

    learns_encoder_weights = False
    num_experts = 1
    router_held = False

    def __init__(self, inputs: FusionInputs) -> None:
        super().__init__()
        self.num_layers = inputs.num_layers
        self.used = inputs.names

    @abstractmethod
    def route(self, prompt_vector: Tensor) -> Routing:
        """The routing for prompt vectors (B,P), float32, before any audio is encoded."""

    @abstractmethod
    def forward(self, embeddings: Sequence[Tensor | None], routing: Routing) -> Tensor:
        """Combine M streams (B,U,D) into one (B,U,D); None for an encoder of weight zero in the whole batch."""

    def mixture_parameters(self) -> list[nn.Parameter]:
        """The weights of encoders and layers, apart from the networks behind them."""
        return [parameter for name, parameter in self.named_parameters() if name.startswith("layer_logits")]

    @torch.no_grad()
    def set_encoder_weights(self, expert: int, weights: Tensor) -> None:
        """Give the encoders weights (M,), which sum to one, for the prompts of ``expert``; each keeps the shares of its
        layers. For fusions whose encoders compete for weight alone."""
        logits = next(iter(self.mixture_parameters())).view(-1, sum(self.num_layers))[expert]
        for part, weight in zip(logits.split(self.num_layers), weights.tolist(), strict=True):
            part.add_(math.log(max(weight, 1e-6)) - part.logsumexp(0))


def unrouted(prompt_vector: Tensor, layer_weights: list[Tensor]) -> Routing:
    """The routing without a router: one expert with probability one, the same layer weights (H_m,) for all prompts."""
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
