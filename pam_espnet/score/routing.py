"""Routing of a decoding, per task: which expert, and the weight of each encoder and layer.

Reads ``nbest.jsonl`` of decode directories; loads no model. Dimension letters: E experts, H layers.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pam_espnet.errors import DataError


@dataclass
class TaskRouting:
    """Means over the utterances of one task."""

    utterances: int
    expert_share: np.ndarray  # (E,) fraction of utterances that each expert was chosen for
    expert_probs: np.ndarray  # (E,) mean probability of the router
    layers: dict[str, np.ndarray]  # encoder -> (H,) weight of its selected layers; all together add up to 1

    @property
    def expert(self) -> int:
        """The expert of most utterances, counted from 0."""
        return int(self.expert_share.argmax())

    @property
    def encoders(self) -> dict[str, float]:
        """Encoder -> its weight, summed over its layers."""
        return {name: float(weights.sum()) for name, weights in self.layers.items()}

    def distance(self, other: "TaskRouting") -> float:
        """Total variation of the weights of encoders and layers: 0 if they are the same, 1 if no layer is in both."""
        names = {**self.layers, **other.layers}
        pairs = ((self.layers.get(name, np.zeros(1)), other.layers.get(name, np.zeros(1))) for name in names)
        return float(sum(np.abs(one - two).sum() for one, two in pairs) / 2)

    def describe(self) -> str:
        """One cell of a table: ``expert 2: whisper 0.71, yamnet 0.29`` (largest first; no expert if there is one)."""
        parts = sorted(self.encoders.items(), key=lambda item: (-item[1], item[0]))
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in parts)
        share = self.expert_share[self.expert]
        part = "" if share == 1 else f" ({share:.0%})"
        return weights if len(self.expert_share) == 1 else f"expert {self.expert}{part}: {weights}"

    def record(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "utterances": self.utterances,
            "expert": self.expert,
            "expert_share": self.expert_share.tolist(),
            "expert_probs": self.expert_probs.tolist(),
            "encoders": self.encoders,
            "layers": {name: weights.tolist() for name, weights in self.layers.items()},
        }


def read_routing(paths: Iterable[Path]) -> dict[str, TaskRouting]:
    """Mean routing per task over the utterances of some ``nbest.jsonl`` files; tasks in alphabetic order.

    Raises DataError: a line is no JSON object with ``task`` and ``routing``, or two lines come from different models.
    """
    paths = list(paths)
    found: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    entry = json.loads(line)
                    found.setdefault(entry["task"], []).append(entry["routing"])
                except (ValueError, KeyError, TypeError) as error:
                    hint = "decode this set again (stage 4)"
                    raise DataError(path, f"not an n-best entry: {error!r}", line=number, hint=hint) from error
    try:
        return {task: _mean(entries) for task, entries in sorted(found.items())}
    except (ValueError, KeyError, IndexError, TypeError) as error:
        names = ", ".join(map(str, paths))
        raise DataError(names, f"entries of different models: {error!r}", hint="decode again (stage 4)") from error


def _mean(entries: list[dict[str, Any]]) -> TaskRouting:
    probs = np.array([entry["expert_probs"] for entry in entries], dtype=np.float64)
    share = np.bincount([entry["expert"] for entry in entries], minlength=probs.shape[1]) / len(entries)
    layers = {name: np.array([entry["layers"][name] for entry in entries]).mean(0) for name in entries[0]["layers"]}
    return TaskRouting(len(entries), share, probs.mean(0), layers)
