"""The routing that a fusion decides on from the prompt, and the operations on it.

Dimension letters: B utterances, M encoders, E experts, H layers.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Routing:
    """How the encoders are combined for each utterance; written to the logs and the result files."""

    expert_logits: Tensor | None  # (B,E), those that went into the softmax; None for a fusion without a router
    expert_probs: Tensor  # (B,E), rows sum to one; ones (B,1) without a router
    expert: Tensor  # (B,) long, the top-1 expert
    gate: Tensor  # (B,E) what each expert's output is multiplied by
    layer_weights: list[Tensor]  # per encoder (B,H_m); over all of them they sum to one for each utterance
    chosen: list[int] | None = None  # ``expert`` on the host, where each utterance is given to its expert alone

    @property
    def encoder_weights(self) -> Tensor:
        """(B,M): each encoder's weight, its layers' weights summed."""
        return torch.stack([weights.sum(dim=1) for weights in self.layer_weights], dim=1)


def skip_encoders(routing: Routing, threshold: float) -> Routing:
    """Set the encoders below ``threshold`` to zero, utterance by utterance, and renormalise the others.

    The decision for an utterance uses its own weights only, so its result does not depend on the other prompts of the
    batch. Where all encoders are below the threshold the heaviest one stays.
    """
    weights = routing.encoder_weights  # (B,M)
    heaviest = nn.functional.one_hot(weights.argmax(dim=1), weights.shape[1]).bool()
    keep = (weights >= threshold) | heaviest
    share = keep / (weights * keep).sum(dim=1, keepdim=True)  # (B,M): 0, or 1 / the remaining weight
    layer_weights = [layers * share[:, index, None] for index, layers in enumerate(routing.layer_weights)]
    return dataclasses.replace(routing, layer_weights=layer_weights)


def keep_encoder(routing: Routing, index: Sequence[int]) -> Routing:
    """``routing`` with all weight on one encoder for each utterance, ``index`` (B), shared by its layers as before."""
    weights = []
    for m, layers in enumerate(routing.layer_weights):
        kept = layers.new_tensor([one == m for one in index])[:, None]
        weights.append(kept * layers / layers.sum(dim=1, keepdim=True).clamp_min(1e-20))
    return dataclasses.replace(routing, layer_weights=weights)


def join_routing(parts: Sequence[Routing]) -> Routing:
    """The utterances of ``parts``, one after the other."""
    logits = [part.expert_logits for part in parts if part.expert_logits is not None]
    return Routing(
        expert_logits=torch.cat(logits) if logits else None,
        expert_probs=torch.cat([part.expert_probs for part in parts]),
        expert=torch.cat([part.expert for part in parts]),
        gate=torch.cat([part.gate for part in parts]),
        layer_weights=[torch.cat(weights) for weights in zip(*(part.layer_weights for part in parts), strict=True)],
        chosen=None if parts[0].chosen is None else [one for part in parts for one in part.chosen or ()],
    )


def router_loss(routing: Routing, task_index: Tensor) -> Tensor:
    """Cross-entropy that teaches the router one expert per task, the mean over utterances; zero without a router.
    ``task_index`` (B,) long is taken modulo E where there are more tasks than experts."""
    if routing.expert_logits is None:
        return routing.expert_probs.new_zeros(())
    return nn.functional.cross_entropy(routing.expert_logits, task_index % routing.expert_logits.shape[1])
