"""The fusions that PaM is measured against: single, average, concat, static. None of them looks at the prompt.

Dimension letters: B utterances, U adapter frames, M encoders, H layers, D width, P prompt-vector width.

All learn a softmax over the layers within an encoder, as PaM does: they differ in how encoders are combined.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pam_espnet.errors import ConfigError
from pam_espnet.frontend.fusion.base import AbsFusion, balanced_logits, weighted_sum
from pam_espnet.frontend.fusion.experts import ResidualExperts
from pam_espnet.frontend.fusion.routing import Routing


class AverageFusion(AbsFusion):
    """The mean of all streams."""

    def __init__(self, num_layers: Sequence[int], width: int, prompt_width: int, names: Sequence[str]) -> None:
        super().__init__(num_layers, width, prompt_width, names)
        self.layer_logits = nn.ParameterList(torch.zeros(count) for count in num_layers)

    def route(self, prompt_vector: Tensor) -> Routing:
        """See AbsFusion: 1/M for every encoder."""
        return self.unrouted(prompt_vector, [logits.softmax(0) / len(self.names) for logits in self.layer_logits])

    def forward(self, embeddings: Sequence[Tensor | None], routing: Routing) -> Tensor:
        """See AbsFusion."""
        return weighted_sum(embeddings, routing.encoder_weights)


class ConcatFusion(AverageFusion):
    """All streams side by side, brought back to D by a linear layer, which starts as the mean of the streams.

    The routing reports 1/M per encoder: how much the linear layer takes of each is not a single number.
    """

    def __init__(self, num_layers: Sequence[int], width: int, prompt_width: int, names: Sequence[str]) -> None:
        super().__init__(num_layers, width, prompt_width, names)
        self.project = nn.Linear(len(names) * width, width)
        with torch.no_grad():
            self.project.weight.copy_((torch.eye(width) / len(names)).repeat(1, len(names)))
            self.project.bias.zero_()

    def forward(self, embeddings: Sequence[Tensor | None], routing: Routing) -> Tensor:
        """See AbsFusion; an absent stream counts as zero."""
        present = next(stream for stream in embeddings if stream is not None)
        streams = [torch.zeros_like(present) if stream is None else stream for stream in embeddings]
        return self.project(torch.cat(streams, dim=-1))


class SingleFusion(AbsFusion):
    """One encoder alone; the others get weight zero and are never run.

    Args:
        num_layers, width, prompt_width, names: see AbsFusion.
        encoder: its name; may be left out where there is only one.

    Raises:
        ConfigError: no such encoder.
    """

    def __init__(
        self,
        num_layers: Sequence[int],
        width: int,
        prompt_width: int,
        names: Sequence[str],
        encoder: str | None = None,
    ) -> None:
        super().__init__(num_layers, width, prompt_width, names)
        if encoder is None and len(names) == 1:
            encoder = names[0]
        if encoder is None or encoder not in names:
            raise ConfigError(f"fusion_conf.encoder: {encoder!r}; single needs one of {', '.join(names)}")
        self.used = (encoder,)
        self.index = self.names.index(encoder)
        self.layer_logits = nn.Parameter(torch.zeros(num_layers[self.index]))

    def route(self, prompt_vector: Tensor) -> Routing:
        """See AbsFusion."""
        weights = [self.layer_logits.new_zeros(count) for count in self.num_layers]
        weights[self.index] = self.layer_logits.softmax(0)
        return self.unrouted(prompt_vector, weights)

    def forward(self, embeddings: Sequence[Tensor | None], routing: Routing) -> Tensor:
        """See AbsFusion."""
        stream = embeddings[self.index]
        if stream is None:
            raise ValueError(f"single needs the stream of {self.used[0]}")
        return stream


class StaticFusion(AbsFusion):
    """PaM without the prompt: one learned softmax over all (encoder, layer) for everything, and one such expert's FFN.

    Same parts as one PaM expert, so what PaM does better than this is what routing adds.

    Args:
        num_layers, width, prompt_width, names: see AbsFusion.
        expert_hidden: as for PaM: None for D, 0 for weights alone.
    """

    learns_encoder_weights = True

    def __init__(
        self,
        num_layers: Sequence[int],
        width: int,
        prompt_width: int,
        names: Sequence[str],
        expert_hidden: int | None = None,
    ) -> None:
        super().__init__(num_layers, width, prompt_width, names)
        self.layer_logits = nn.Parameter(balanced_logits(num_layers))
        self.experts = ResidualExperts(1, width, width if expert_hidden is None else expert_hidden)

    def route(self, prompt_vector: Tensor) -> Routing:
        """See AbsFusion."""
        return self.unrouted(prompt_vector, list(self.layer_logits.softmax(0).split(self.num_layers)))

    def forward(self, embeddings: Sequence[Tensor | None], routing: Routing) -> Tensor:
        """See AbsFusion."""
        return self.experts(weighted_sum(embeddings, routing.encoder_weights), routing.gate)
