"""A calibration of early exit: maps and gates of the candidate blocks, fitted after training (``early_exit.fitting``).

A *map* brings a block's hidden state towards the last block's (least squares with a ridge towards the identity, as the
linear short-cuts of Yom Din et al., "Jump to Conclusions", LREC-COLING 2024). A *gate* is a logistic regression on the
unmapped state: the probability that the block's most likely token is the last block's.

C candidate blocks, D width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pam_espnet.engine.packed import Plain
from pam_espnet.errors import CheckpointError
from pam_espnet.fileio import atomic_path


@dataclass(frozen=True)
class Calibration:
    """Maps and gates of the candidate blocks.

    Attributes:
        layers: C blocks, from 1.
        maps: (C, D+1, D), the last row a constant; None leaves hidden states as they are.
        gates: (C, D+1), the last entry a constant.
        threshold: the gates' probability at which to exit; None: at none, which is "off".
        product: rows (N,D) through a layer; engines with products of their own give theirs.
    """

    layers: tuple[int, ...]
    maps: Tensor | None
    gates: Tensor
    threshold: float | None
    product: Callable[[Tensor, Plain], Tensor] = field(default=lambda x, layer: layer(x), compare=False)

    def to(self, device: torch.device, dtype: torch.dtype) -> Calibration:
        """The same on another device and in the precision of the states that it will meet."""
        maps = None if self.maps is None else self.maps.to(device, dtype)
        return replace(self, maps=maps, gates=self.gates.to(device, dtype))

    @cached_property
    def _maps(self) -> list[Plain]:
        return [] if self.maps is None else [Plain(one[:-1].T.contiguous(), one[-1]) for one in self.maps]

    @cached_property
    def _gates(self) -> list[Plain]:
        return [Plain(one[None, :-1].contiguous(), one[-1:]) for one in self.gates]

    def mapped(self, layer: int, hidden: Tensor) -> Tensor:
        """A block's hidden states (...,D), brought towards the last block's."""
        if self.maps is None:
            return hidden
        return self.product(hidden, self._maps[self.layers.index(layer)]).to(hidden.dtype)

    def probability(self, layer: int, normed: Tensor) -> Tensor:
        """That the block's token is the last block's: its states after the final norm, not mapped (...,D) -> (...,)."""
        return self.product(normed, self._gates[self.layers.index(layer)])[..., 0].float().sigmoid()

    def save(self, path: str | Path, judgement: Mapping[str, Any]) -> None:
        """Write safetensors; the judgement goes into the metadata."""
        tensors = {"gates": self.gates.contiguous()}
        if self.maps is not None:
            tensors["maps"] = self.maps.contiguous()
        described = {"layers": list(self.layers), "threshold": self.threshold, "judgement": dict(judgement)}
        with atomic_path(path) as tmp:
            tmp.write_bytes(save(tensors, {"calibration": json.dumps(described)}))

    @classmethod
    def load(cls, path: str | Path, width: int) -> Calibration:
        """Read what ``save`` wrote; CheckpointError: no such file, or not of this kind, or of another width."""
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
