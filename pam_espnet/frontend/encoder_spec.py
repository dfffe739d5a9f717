"""Sizes and rates of an encoder, known without loading it; stored with cached features and in configurations.

Dimension letters: H hidden layers, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pam_espnet.errors import ConfigError
from pam_espnet.frontend.encoders.base import AbsEncoder


@dataclass(frozen=True)
class EncoderSpec:
    """Sizes and rates of one encoder, enough to use its cached features."""

    name: str  # in the configuration
    sample_rate: int  # Hz
    frame_rate: float  # Hz
    width: int  # D
    num_layers: int  # H
    layers: tuple[int, ...]  # which hidden states of the model these are
    # Columns of D in use in each layer: those of a convolutional network differ and are filled up with zeros. (): all.
    layer_widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.layer_widths:
            object.__setattr__(self, "layer_widths", (self.width,) * self.num_layers)
        counts = {len(self.layers), len(self.layer_widths), self.num_layers}
        if len(counts) > 1 or max(self.layer_widths) > self.width or min(self.layer_widths) < 1:
            raise ConfigError(f"specs.{self.name}: layers and widths contradict each other: {self}")

    @classmethod
    def of(cls, name: str, encoder: AbsEncoder) -> EncoderSpec:
        """The spec of a loaded encoder."""
        rates = int(encoder.sample_rate), float(encoder.frame_rate)
        widths = tuple(getattr(encoder, "layer_widths", ()))
        return cls(name, *rates, encoder.width, encoder.num_layers, tuple(encoder.layers), widths)

    @classmethod
    def from_dict(cls, name: str, values: Mapping[str, Any]) -> EncoderSpec:
        """The inverse of ``to_dict``. Raises ConfigError: keys missing or unknown."""
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            return cls(**{**given, "name": name})
        except TypeError as error:
            raise ConfigError(f"specs.{name}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings and lists, for YAML and JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
