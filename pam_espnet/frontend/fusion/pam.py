"""PaM, prompt-aware mixture: the prompt picks an expert, the expert weighs encoders and layers.

Dimension letters: B utterances, U adapter frames, M encoders, E experts, H layers, D width, P prompt-vector width.

Sources: the prompt-aware mixture of audio encoders (PaM) for the idea; Fedus, Zoph and Shazeer, "Switch
Transformers" (2022), section 2.1, for top-1 routing scaled by the router's probability; Bengio, Leonard and
Courville, "Estimating or Propagating Gradients Through Stochastic Neurons" (2013), for the straight-through gate.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pam_espnet.config import LAST_COMMIT, check_number
from pam_espnet.errors import ConfigError
from pam_espnet.frontend.fusion.base import AbsFusion, FusionInputs, balanced_logits, weighted_sum
from pam_espnet.frontend.fusion.experts import ResidualExperts
from pam_espnet.frontend.fusion.routing import Routing

GRADIENTS = ("scaled", "straight_through")


class PaMFusion(AbsFusion):
    """E experts, each a learned softmax over all (encoder, layer) and a residual feed-forward network; one per prompt.

    router:  p = softmax(FFN(layer norm of the prompt vector)), expert e = argmax p
    expert:  x = sum over (encoder, layer) of w_e * stream;  y = gate_e * (x + FFN_e(x))

    ``gradient`` is how the router learns from the LLM's loss, since an argmax has no gradient:

    scaled
        ``gate_e = p_e``, as in the Switch transformer. The scale is part of the model and stays at inference. Only
        the chosen expert's probability gets a gradient, whichever expert would have been better.
    straight_through
        ``gate`` is one-hot going forward and ``p`` going backward: trained as it is used, with a biased gradient
        that lets the router compare all experts. All of them are evaluated in training, the chosen one at inference.
        The better choice for prompts that training does not have (egs/mini/pam1/EXPERTS.md).

    Args:
        num_experts: E.
        router_hidden: hidden width of the router.
        gradient: scaled or straight_through.
        noise: standard deviation of the Gaussian noise on the router's logits while training, so that experts
            which are never chosen get a chance.
        init_std: standard deviation of the experts' layer logits around the balanced start; at 0 all experts are
            the same and the router has nothing to choose between.

    Raises ConfigError: an option out of its range.
    """

    learns_encoder_weights = True

    def __init__(
        self,
        inputs: FusionInputs,
        num_experts: int = 3,
        router_hidden: int = 128,
        expert_hidden: int | None = None,
        gradient: str = "scaled",
        noise: float = 0.0,
        init_std: float = 0.1,
    ) -> None:
        super().__init__(inputs)
        if gradient == "soft":
            raise ConfigError(
                f"fusion_conf.gradient: 'soft' is no longer supported; the last commit that had it is {LAST_COMMIT}\n"
                "  -> set straight_through, which also lets the router compare all experts"
            )
        if gradient not in GRADIENTS:
            raise ConfigError(f"fusion_conf.gradient: {gradient!r}; choose one of {', '.join(GRADIENTS)}")
        check_number(num_experts, "fusion_conf.num_experts", at_least=1, whole=True)
        check_number(router_hidden, "fusion_conf.router_hidden", at_least=1, whole=True)
        check_number(noise, "fusion_conf.noise", at_least=0)
        check_number(init_std, "fusion_conf.init_std", at_least=0)
        self.gradient, self.noise = gradient, noise
        self.router = nn.Sequential(
            # Prompt vectors of an LLM have a few huge components; without their scale the router reads the rest.
            nn.LayerNorm(inputs.prompt_width, elementwise_affine=False),
            nn.Linear(inputs.prompt_width, router_hidden),
            nn.GELU(),
            nn.Linear(router_hidden, num_experts),
        )
        start = balanced_logits(inputs.num_layers)
        self.num_experts = num_experts
        self.layer_logits = nn.Parameter(start + init_std * torch.randn(num_experts, len(start)))  # (E, sum of H)
        self.experts = ResidualExperts(num_experts, inputs.width, expert_hidden)

    def route(self, prompt_vector: Tensor) -> Routing:
        """See AbsFusion; ``expert_logits`` include the noise."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.router_held):
            logits = self.router(prompt_vector)  # (B,E)
        if self.training and self.noise > 0:
            logits = logits + self.noise * torch.randn_like(logits)
        probs = logits.softmax(dim=1)
        expert = probs.argmax(dim=1)
        top = nn.functional.one_hot(expert, probs.shape[1]).to(probs.dtype)
        gate = mixing = top
        if self.gradient == "scaled":
            gate = top * probs
        elif self.training:
            gate = mixing = top + (probs - probs.detach())  # the bracket is exactly zero: forward stays one-hot
        # Products and sums instead of a matrix product: a one-hot row picks its expert's weights bit by bit.
        weights = (mixing[:, :, None] * self.layer_logits.softmax(dim=1)).sum(dim=1)  # (B, sum of H)
        # The gradient of a straight-through router compares all experts; nothing else needs what was not chosen.
        needs_all = self.training and self.gradient == "straight_through" and not self.router_held
        # The host needs it: it waits for the device now, when little has been asked of it yet, and not after encoders.
        chosen = None if needs_all else expert.tolist()
        return Routing(logits, probs, expert, gate, list(weights.split(self.num_layers, dim=1)), chosen)

    def forward(self, embeddings: Sequence[Tensor | None], routing: Routing) -> Tensor:
        return self.experts(weighted_sum(embeddings, routing.encoder_weights), routing.gate, routing.chosen)
