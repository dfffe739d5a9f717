"""The fusions that PaM is measured against: single, average, concat, static. None of them reads the prompt.

Dimension letters: B utterances, U adapter frames, M encoders, H layers, D width, P prompt-vector width.

All learn a softmax over the layers within an encoder, as PaM does: they differ in how encoders are combined.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pam_espnet.errors import ConfigError
from pam_espnet.frontend.fusion.base import AbsFusion, FusionInputs, balanced_logits, unrouted, weighted_sum
from pam_espnet.frontend.fusion.experts import ResidualExperts
from pam_espnet.frontend.fusion.routing import Routing


class AverageFusion(AbsFusion):
    """The mean of all streams."""

    def __init__(self, inputs: FusionInputs) -> None:
        super().__init__(inputs)
        self.layer_logits = nn.ParameterList(torch.zeros(count) for count in inputs.num_layers)

    def route(self, prompt_vector: Tensor) -> Routing:
        """See AbsFusion: 1/M for every encoder."""
        return unrouted(prompt_vector, [logits.softmax(0) / len(self.num_layers) for logits in self.layer_logits])

    def forward(self, embeddings: Sequence[Tensor | None], routing: Routing) -> Tensor:
        return weighted_sum(embeddings, routing.encoder_weights)


class ConcatFusion(AverageFusion):
    """All streams side by side, brought back to D by a linear layer, which starts as the mean of the streams.

    The routing reports 1/M per encoder: how much the linear layer takes of each is not a single number.
    """

    def __init__(self, inputs: FusionInputs) -> None:
        super().__init__(inputs)
        count, width = len(inputs.names), inputs.width
        self.project = nn.Linear(count * width, width)
        with torch.no_grad():
            self.project.weight.copy_((torch.eye(width) / count).repeat(1, count))
            self.project.bias.zero_()

    def forward(self, embeddings: Sequence[Tensor | None], routing: Routing) -> Tensor:
        """See AbsFusion; an absent stream counts as zero."""
        present = next(stream for stream in embeddings if stream is not None)
        streams = [torch.zeros_like(present) if stream is None else stream for stream in embeddings]
        return self.project(torch.cat(streams, dim=-1))


class SingleFusion(AbsFusion):
    """One encoder alone; the others get weight zero and are never run.

    Args:
        encoder: its name; may be left out where there is only one.

    Raises ConfigError: no such encoder.
    """

    def __init__(self, inputs: FusionInputs, encoder: str | None = None) -> None:
        super().__init__(inputs)
        if encoder is None and len(inputs.names) == 1:
            encoder = inputs.names[0]
        if encoder is None or encoder not in inputs.names:
            raise ConfigError(f"fusion_conf.encoder: {encoder!r}; single needs one of {', '.join(inputs.names)}")
        self.used = (encoder,)
        self.index = inputs.names.index(encoder)
        self.layer_logits = nn.Parameter(torch.zeros(inputs.num_layers[self.index]))

    def route(self, prompt_vector: Tensor) -> Routing:
        weights = [self.layer_logits.new_zeros(count) for count in self.num_layers]
        weights[self.index] = self.layer_logits.softmax(0)
        return unrouted(prompt_vector, weights)

    def forward(self, embeddings: Sequence[Tensor | None], routing: Routing) -> Tensor:
        stream = embeddings[self.index]
        if stream is None:
            raise ValueError(f"single needs the stream of {self.used[0]}")
        return stream


class StaticFusion(AbsFusion):
    """PaM without the prompt: one learned softmax over all (encoder, layer) for everything, and one such expert's FFN.

    Same parts as one PaM expert, so what PaM does better than this is what routing adds.
    """

    learns_encoder_weights = True

    def __init__(self, inputs: FusionInputs, expert_hidden: int | None = None) -> None:
        super().__init__(inputs)
        self.layer_logits = nn.Parameter(balanced_logits(inputs.num_layers))
        self.experts = ResidualExperts(1, inputs.width, expert_hidden)

    def route(self, prompt_vector: Tensor) -> Routing:
        return unrouted(prompt_vector, list(self.layer_logits.softmax(0).split(self.num_layers)))

    def forward(self, embeddings: Sequence[Tensor | None], routing: Routing) -> Tensor:
        return self.experts(weighted_sum(embeddings, routing.encoder_weights), routing.gate)
