"""Fitting of maps and gates, and the judgement of what they are worth, by a cost model and without a clock.

N tokens, C candidate blocks, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pam_espnet.engine.calibration import Calibration

WORTH_IT = 1.05  # predicted speed-up below which the answer is "off"


@dataclass(frozen=True)
class CostModel:
    """Costs of a step in units of one block's weights.

    Attributes:
        blocks: of the LLM.
        head: the output layer.
        memory: keys and values of one skipped block.
    """

    blocks: int
    head: float
    memory: float

    @classmethod
    def of(cls, blocks: Sequence[int], head: int, memory: int) -> CostModel:
        """From numbers of weights: of each block, of the output layer, of one block's key and value projections."""
        mean = sum(blocks) / len(blocks)
        return cls(len(blocks), head / mean, memory / mean)

    def speedup(self, depths: Tensor, checks: Tensor | float = 0.0) -> float:
        """Steps at full depth against steps at ``depths`` (N,), linear gates counted as free.

        ``checks`` (N,) says how often the output layer was asked only to know whether to leave.
        """
        cost = depths + (self.blocks - depths) * self.memory + (1 + checks) * self.head
        return float((self.blocks + self.head) / cost.double().mean())


@dataclass(frozen=True)
class Judgement:
    """What the gates did to the utterances that they were not fitted on.

    Attributes:
        threshold: of the gates' probabilities; None where none was good enough.
        coverage: share of tokens that leave early.
        precision: share of those whose token is the last block's.
        mean_depth: blocks per token.
        speedup: by the cost model, against full depth.
    """

    threshold: float | None
    coverage: float
    precision: float
    mean_depth: float
    speedup: float

    @property
    def worth_it(self) -> bool:
        """Whether to use the gates at all."""
        return self.speedup >= WORTH_IT


def fit_map(hidden: Tensor, last: Tensor, ridge: float) -> Tensor:
    """(D+1,D) such that ``[hidden, 1] @ map`` is close to ``last``, both (N,D).

    ``ridge`` times the mean square of a hidden value pulls the map towards the identity; the constant is free.
    """
    count, width = hidden.shape
    start = torch.eye(width + 1, width)
    inputs = torch.cat([hidden, torch.ones(count, 1, dtype=hidden.dtype)], dim=1).double()
    missing = last.double() - inputs @ start.double()
    penalty = torch.full((width + 1,), ridge * float(hidden.double().square().mean()) * count, dtype=torch.double)
    penalty[-1] = 1e-6
    change = torch.linalg.solve(inputs.T @ inputs + penalty.diag(), inputs.T @ missing)
    return (start + change).float()


def fit_gate(normed: Tensor, agrees: Tensor, penalty: float = 1e-2, steps: int = 60) -> Tensor:
    """(D+1,) logistic regression of ``agrees`` (N,) on ``normed`` (N,D), L2 ``penalty`` on the weights, by L-BFGS."""
    scale = normed.std(dim=0).clamp_min(1e-6)
    inputs = normed / scale
    weights = torch.zeros(normed.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = inputs @ weights[:-1] + weights[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, agrees.float())
        value = value + penalty * weights[:-1].square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    fitted = weights.detach()
    return torch.cat([fitted[:-1] / scale, fitted[-1:]])


def outcome(
    opened: Tensor,
    right: Tensor,
    layers: Sequence[int],
    cost: CostModel,
    threshold: float | None = None,
    checked: bool = False,
) -> Judgement:
    """What comes of leaving at the first candidate block that is open.

    Args:
        opened: (C,N) whether a token may leave there.
        right: (C,N) whether the block's most likely token is the last block's.
        layers: the C blocks, from 1.
        cost: of steps.
        threshold: noted in the result.
        checked: every candidate that was asked ran the output layer, which counts.
    """
    leaves, first = opened.any(dim=0), opened.float().argmax(dim=0)
    good = right.gather(0, first[None])[0][leaves].float()
    depths = torch.where(leaves, torch.tensor(layers)[first], cost.blocks)
    asked = torch.where(leaves, first + 1, len(layers)) if checked else 0.0
    return Judgement(
        threshold,
        coverage=float(leaves.float().mean()),
        precision=float(good.mean()) if len(good) else 1.0,
        mean_depth=float(depths.float().mean()),
        speedup=cost.speedup(depths, asked),
    )


@torch.no_grad()
def judge(
    calibration: Calibration,
    hidden: Sequence[Tensor],
    last_token: Tensor,
    norm: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    cost: CostModel,
    precision: float,
) -> Judgement:
    """The lowest threshold at which tokens that leave are the last block's often enough, and what it is worth.

    Args:
        calibration: its own threshold does not count.
        hidden: per candidate block (N,D), of tokens that nothing was fitted on.
        last_token: (N,) the last block's most likely tokens.
        norm: the final norm.
        head: the output layer, normed states -> logits.
        cost: of steps.
        precision: wanted among the tokens that leave.
    """
    probabilities, right = [], []
    for layer, states in zip(calibration.layers, hidden, strict=True):
        probabilities.append(calibration.probability(layer, norm(states)))
        right.append(head(norm(calibration.mapped(layer, states))).argmax(-1) == last_token)
    best = Judgement(None, 0.0, 1.0, float(cost.blocks), 1.0)
    for threshold in torch.linspace(0.99, 0.2, 80).tolist():
        opened = torch.stack(probabilities) >= threshold  # (C,N)
        found = outcome(opened, torch.stack(right), calibration.layers, cost, threshold)
        if found.precision >= precision and found.speedup > best.speedup:
            best = found
    return best
