"""State of training besides the files of the experiment: taken as plain values and tensors, and put back.

Everything here passes ``torch.load(weights_only=True)``. Gradients are not part of it: a state is taken when the
optimizers have used them up.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from espnet2.train.reporter import Average, SubReporter, WeightedAverage
from torch import Tensor, nn


@dataclass(frozen=True)
class Training:
    """The objects that a step changes."""

    model: nn.Module  # bare or inside DistributedDataParallel; what its ``state_dict`` omits never changes
    optimizers: Sequence[Any]
    schedulers: Sequence[Any]  # one for each optimizer, or None
    scaler: Any  # of mixed precision, or None
    reporter: SubReporter  # ESPnet's statistics of the epoch

    @property
    def bare_model(self) -> nn.Module:
        """The model without the wrapper that shares it over processes."""
        if isinstance(self.model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            return self.model.module
        return self.model

    def trained(self) -> dict[str, Tensor]:
        """The trained tensors by name."""
        return self.bare_model.state_dict()

    def rest(self) -> dict[str, Any]:
        """The state of everything but the model."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [None if s is None else s.state_dict() for s in self.schedulers],
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "statistics": {key: [_pair(value) for value in values] for key, values in self.reporter.stats.items()},
        }

    def load_rest(self, state: dict[str, Any]) -> None:
        """Put back what ``rest`` returned; the reporter must be at the beginning of its epoch.
        Raises ValueError, KeyError, RuntimeError: it is the state of other optimizers or schedulers."""
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            if scheduler is not None:
                scheduler.load_state_dict(saved)
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        for key, pairs in state["statistics"].items():
            self.reporter.stats[key] = [Average(v) if w is None else WeightedAverage(v, w) for v, w in pairs]
        self.reporter.count = len(next(iter(state["statistics"].values()), []))
        self.reporter.total_count += self.reporter.count


def _pair(value: Any) -> tuple[float, float | None]:
    return value.value, getattr(value, "weight", None)


def random_state() -> dict[str, Any]:
    """The generators of Python, NumPy and torch (CPU, and this process's GPU where one is in use)."""
    legacy: Any = np.random.get_state(legacy=False)
    generator = {**legacy["state"], "key": legacy["state"]["key"].tolist()}
    return {
        "python": random.getstate(),
        "numpy": {**legacy, "state": generator},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what ``random_state`` returned."""
    random.setstate(state["python"])
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
