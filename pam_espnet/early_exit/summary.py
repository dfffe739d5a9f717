"""Figures from a profile of the blocks: agreement, the oracle's exit, and what gates would do at every threshold.

An oracle knows the last block's token: it leaves at the first block that names it (*first match*), or at the first from
which all later ones do (*saturated*). Nothing can decode like that; it bounds what gates can reach. Speeds are bounds
by the cost model (``decoder.calibration.CostModel``), not measurements.

Dimension letters: N tokens, P points of reading, C candidate blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from pam_espnet.early_exit.judge import CostModel, outcome
from pam_espnet.early_exit.profile import PLACES, Profile, Reading

ROWS = 4  # rows that must leave together, in the oracle's second bound
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.999)


def summarise(found: Profile, cost: CostModel, threshold: float | None) -> dict[str, Any]:
    """All figures of a test set by task, as JSON values.

    Groups of tokens: ``all``; ``step``, all but an answer's first; and by place ``first``, ``later``, ``end``. An
    empty group has no agreement (None). Oracle: ``all`` and ``step``. Gates: ``step``, as only steps can leave.

    Args:
        found: the profile.
        cost: of steps.
        threshold: the gate's own, added to those that are tried.
    """
    return {
        task: _summary(found, torch.tensor([name == task for name in found.task]), cost, threshold)
        for task in sorted(set(found.task))
    }


def _summary(found: Profile, chosen: Tensor, cost: CostModel, threshold: float | None) -> dict[str, Any]:
    groups = {"all": chosen, "step": chosen & found.step}
    for place in PLACES:
        groups[place] = chosen & torch.tensor([name == place for name in found.place])
    readings = {"bare": found.bare, "inner": found.inner, "mapped": found.mapped}
    steps, right = groups["step"], found.right()
    gates = {}
    for mode, sureness in found.sureness.items():
        own = [threshold] if mode == "gate" and threshold is not None else []
        tried = sorted([*own, *(at for at in THRESHOLDS if not own or abs(at - own[0]) > 1e-6)])
        gates[mode] = [
            outcome((sureness >= at)[:, steps], right[:, steps], found.layers, cost, at, checked=mode != "gate")
            for at in tried
        ]
    for count, opened in found.patience.items():
        gates[f"patience {count}"] = [
            outcome(opened[:, steps], right[:, steps], found.layers, cost, checked=True)
        ]
    return {
        "tokens": {name: int(group.sum()) for name, group in groups.items()},
        "agreement": {name: _means(one, "same", groups) for name, one in readings.items() if one is not None},
        "overlap": {name: _means(one, "overlap", groups) for name, one in readings.items() if one is not None},
        "oracle": {
            group: {
                "every block, bare": oracle(found.bare.same[:, groups[group]], range(1, cost.blocks + 1), cost),
                "candidate blocks": oracle(right[:, groups[group]], found.layers, cost),
            }
            for group in ("all", "step")
        },
        "gates": {mode: [asdict(one) for one in rows] for mode, rows in gates.items()} if steps.any() else {},
    }


def _means(reading: Reading, figure: str, groups: dict[str, Tensor]) -> dict[str, list[float] | None]:
    """Per group the mean at each point."""
    table = getattr(reading, figure).float()
    return {name: table[:, group].mean(dim=1).tolist() if group.any() else None for name, group in groups.items()}


def oracle(same: Tensor, layers: Sequence[int], cost: CostModel) -> dict[str, dict[str, float]] | None:
    """Depths and speeds of an oracle that may leave at ``layers``.

    Args:
        same: (P,N) whether the token of each of ``layers`` is the last block's.
        layers: P blocks, from 1.
        cost: of steps.

    Returns:
        for ``first match`` and ``saturated`` the mean depth and the speed-up, of single rows and of ``ROWS`` rows that
        must leave together; None without tokens.
    """
    if not same.shape[1]:
        return None
    ends = torch.ones(1, same.shape[1], dtype=torch.bool)
    same = torch.cat([same, ends])  # who leaves nowhere is named by the last block
    depths = torch.tensor([*layers, cost.blocks])
    saturated = same.flip(0).cummin(dim=0).values.flip(0)
    found = {}
    for name, table in (("first match", same), ("saturated", saturated)):
        left = depths[table.to(torch.int8).argmax(dim=0)]
        together = mean_of_deepest(left, ROWS)
        found[name] = {
            "mean_depth": float(left.double().mean()),
            "speedup": cost.speedup(left),
            "mean_depth_together": together,
            "speedup_together": cost.speedup(torch.tensor([together])),  # costs are linear in the depth
        }
    return found


def mean_of_deepest(depths: Tensor, rows: int) -> float:
    """The mean depth of ``rows`` independent tokens, drawn from ``depths`` (N,), that all go as deep as the deepest."""
    levels = depths.unique()
    below = (depths[None] <= levels[:, None]).double().mean(dim=1) ** rows  # that none is deeper than the level
    return float((levels * below.diff(prepend=torch.zeros(1, dtype=torch.double))).sum())
