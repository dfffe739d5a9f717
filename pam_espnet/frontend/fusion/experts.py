"""The experts' feed-forward networks: E residual blocks, of which an utterance normally uses one.

Dimension letters: B utterances, U adapter frames, E experts, D width, F hidden width.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pam_espnet.config import check_number
from pam_espnet.transfer import upload


class ResidualExperts(nn.Module):
    """``sum over e of gate_e * (x + FFN_e(x))`` with ``FFN = linear(GELU(linear(layer norm)))``.

    The output layers start at zero, so that an untrained expert returns its input.

    The weights of all experts are stacked in one tensor each: an expert that no utterance of a batch chose gets a
    gradient of zeros rather than none, which DistributedDataParallel needs.

    Args:
        num_experts: E.
        width: D.
        hidden: F; None for D, 0 for no networks.

    Raises ConfigError: F below zero.
    """

    # Far below the streams' unit variance; bounds the gradient of a frame that is all zero (an encoder that stops
    # before the clip does), which 1/std would multiply by hundreds.
    norm_eps = 1e-2

    def __init__(self, num_experts: int, width: int, hidden: int | None) -> None:
        super().__init__()
        hidden = width if hidden is None else hidden
        check_number(hidden, "fusion_conf.expert_hidden", at_least=0, whole=True)
        self.num_experts, self.width, self.hidden = num_experts, width, hidden
        if hidden:
            bound = 1 / math.sqrt(width)  # as nn.Linear
            self.in_weight = nn.Parameter(torch.empty(num_experts, width, hidden).uniform_(-bound, bound))
            self.in_bias = nn.Parameter(torch.zeros(num_experts, hidden))
            self.out_weight = nn.Parameter(torch.zeros(num_experts, hidden, width))
            self.out_bias = nn.Parameter(torch.zeros(num_experts, width))

    def _expert(self, index: int, x: Tensor) -> Tensor:
        if not self.hidden:
            return x
        normed = nn.functional.layer_norm(x, (self.width,), eps=self.norm_eps)
        inner = nn.functional.gelu(normed @ self.in_weight[index] + self.in_bias[index])
        return x + inner @ self.out_weight[index] + self.out_bias[index]

    def forward(self, x: Tensor, gate: Tensor, expert: Sequence[int] | None = None) -> Tensor:
        """Gated sum of ``x`` (B,U,D) with ``gate`` (B,E). ``expert``: of each utterance the only one that counts;
        None runs all of them."""
        if expert is None:
            outputs = [gate[:, index, None, None] * self._expert(index, x) for index in range(self.num_experts)]
            return torch.stack(outputs).sum(dim=0)
        order = np.argsort(expert, kind="stable")  # the utterances of the first expert, of the second one, ...
        rows, back = upload(x.device, order, np.argsort(order))
        outputs = []
        for index, chosen in enumerate(rows.split(np.bincount(expert).tolist())):
            if len(chosen):
                outputs.append(gate[chosen, index, None, None] * self._expert(index, x[chosen]))
        return torch.cat(outputs)[back]
