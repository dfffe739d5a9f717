"""What makes an intermediate block speak like the last one, and know when it does; fitted after training.

A *map* brings a block's hidden state towards the last block's (least squares with a ridge towards the identity, as the
linear short-cuts of Yom Din et al., "Jump to Conclusions", LREC-COLING 2024). The identity is the setting of early
exit as a natural capability (Shan et al., arXiv 2412.01455). A *gate* is a logistic regression on the state itself (a
map may erase what gives doubts away) that says whether the block's most likely token is the last block's. No gradient
reaches the LLM, no output layer is added.

Everything is fitted on some utterances and judged on others; what the judge does not believe to be worth it is
answered with "off".

N tokens, C candidate blocks, D width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pam_espnet.errors import CheckpointError
from pam_espnet.fileio import atomic_path

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


@dataclass(frozen=True)
class Calibration:
    """Maps and gates of the candidate blocks.

    Attributes:
        layers: C blocks, from 1.
        maps: (C, D+1, D), the last row a constant; None leaves hidden states as they are.
        gates: (C, D+1), the last entry a constant.
        threshold: the gates' probability at which to leave; None: at none, which is "off".
    """

    layers: tuple[int, ...]
    maps: Tensor | None
    gates: Tensor
    threshold: float | None

    def to(self, device: torch.device, dtype: torch.dtype) -> Calibration:
        """The same on another device and in the precision of the states that it will meet."""
        maps = None if self.maps is None else self.maps.to(device, dtype)
        return Calibration(self.layers, maps, self.gates.to(device, dtype), self.threshold)

    def mapped(self, layer: int, hidden: Tensor) -> Tensor:
        """A block's hidden states (...,D), brought towards the last block's."""
        if self.maps is None:
            return hidden
        return apply_map(self.maps[self.layers.index(layer)].to(hidden), hidden)

    def probability(self, layer: int, normed: Tensor) -> Tensor:
        """That the block's token is the last block's: its states after the final norm, not mapped (...,D) -> (...,)."""
        gate = self.gates[self.layers.index(layer)].to(normed)
        return (normed @ gate[:-1] + gate[-1]).float().sigmoid()

    def save(self, path: str | Path, judgement: Judgement) -> None:
        """Write safetensors; the judgement goes into the metadata."""
        tensors = {"gates": self.gates.contiguous()}
        if self.maps is not None:
            tensors["maps"] = self.maps.contiguous()
        described = {"layers": list(self.layers), "threshold": self.threshold, "judgement": asdict(judgement)}
        with atomic_path(path) as tmp:
            save_file(tensors, tmp, metadata={"calibration": json.dumps(described)})

    @classmethod
    def load(cls, path: str | Path, width: int) -> Calibration:
        """Read what ``save`` wrote.

        Raises:
            CheckpointError: no such file, another kind of file, or one of an LLM of another width.
        """
        try:
            with safe_open(str(path), "pt") as file:
                described = json.loads((file.metadata() or {})["calibration"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            # Version 0.1 could also hold fill_<block>, maps of keys and values, which are no longer read.
            layers = tuple(described["layers"])
            found = cls(layers, tensors.get("maps"), tensors["gates"], described["threshold"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            hint = "make it: python -m pam_espnet.bin.pam_calibrate_exit"
            raise CheckpointError(f"{path}: no calibration of early exit ({error})\n  -> {hint}") from error
        if found.gates.shape[1] != width + 1:
            raise CheckpointError(f"{path}: made for an LLM of width {found.gates.shape[1] - 1}, not {width}")
        return found


def apply_map(matrix: Tensor, hidden: Tensor) -> Tensor:
    """``[hidden, 1] @ matrix``: a map (D+1,D), its last row a constant, on hidden states (...,D)."""
    return hidden @ matrix[:-1] + matrix[-1]


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
