"""What is known of an encoder without loading it; stored with cached features and in configurations.

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
    """What the frontend must know of an encoder to use its cached features without loading it.

    Attributes:
        name: in the configuration.
        sample_rate: Hz.
        frame_rate: Hz.
        width: D.
        num_layers: H.
        layers: which hidden states of the model these are.
        layer_widths: how many of the D columns of each layer are in use (a convolutional network has layers of
            different widths; the encoder fills them up with zeros). Left out: all D.
    """

    name: str
    sample_rate: int
    frame_rate: float
    width: int
    num_layers: int
    layers: tuple[int, ...]
    layer_widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.layer_widths:
            object.__setattr__(self, "layer_widths", (self.width,) * self.num_layers)
        counts = {len(self.layers), len(self.layer_widths), self.num_layers}
        if len(counts) > 1 or max(self.layer_widths) > self.width or min(self.layer_widths) < 1:
            raise ConfigError(f"specs.{self.name}: layers and widths contradict each other: {self}")

    @classmethod
    def of(cls, name: str, encoder: AbsEncoder) -> EncoderSpec:
        """The spec of a loaded encoder; it may have an attribute ``layer_widths``."""
        rates = int(encoder.sample_rate), float(encoder.frame_rate)
        widths = tuple(getattr(encoder, "layer_widths", ()))
        return cls(name, *rates, encoder.width, encoder.num_layers, tuple(encoder.layers), widths)

    @classmethod
    def from_dict(cls, name: str, values: Mapping[str, Any]) -> EncoderSpec:
        """From what ``to_dict`` gave, maybe by way of YAML or JSON.

        Raises:
            ConfigError: keys missing or unknown.
        """
        expected = {field.name for field in dataclasses.fields(cls)} - {"name"}
        given: dict[str, Any] = {key: value for key, value in values.items() if key != "name"}
        if not expected - {"layer_widths"} <= set(given) <= expected:
            raise ConfigError(f"specs.{name}: keys {sorted(given)}, expected {sorted(expected)}")
        given.update({key: tuple(given[key]) for key in ("layers", "layer_widths") if key in given})
        return cls(name=name, **given)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for YAML and JSON."""
        values = dataclasses.asdict(self)
        values.update(layers=list(self.layers), layer_widths=list(self.layer_widths))
        return values
