"""Layer mix and adapter: one encoder's hidden states to a stream of the LLM's width at the common frame rate.

Dimension letters: B utterances, T encoder frames, U adapter frames, H layers, D width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pam_espnet.config import check_number
from pam_espnet.errors import ConfigError
from pam_espnet.frontend.encoders.base import padding_mask


def mix_layers(states: Tensor, frames: Tensor, weights: Tensor, layer_widths: Sequence[int]) -> Tensor:
    """Weighted mean over an encoder's layers, each layer normalised first (no affine part), in float32.

    Args:
        states: (B,H,T,D).
        frames: (B,); states beyond them are ignored, but must be finite.
        weights: (B,H), at least zero; normalised here to w(h | encoder). A row of zeros gives zeros.
        layer_widths: the columns in use per layer (H numbers); the rest of D is padding and stays zero.

    Returns:
        (B,T,D), zero beyond each utterance's frames.
    """
    with torch.autocast(states.device.type, enabled=False):
        conditional = weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-20)
        # Layers differ in scale by orders of magnitude; unnormalised, the largest would win whatever the weights.
        normed = _normalise(states.float(), layer_widths)
        mixed = torch.einsum("bh,bhtd->btd", conditional, normed)
    return mixed.masked_fill(padding_mask(frames.to(mixed.device), mixed.shape[1])[..., None], 0.0)


def _normalise(states: Tensor, layer_widths: Sequence[int]) -> Tensor:
    width = states.shape[-1]
    if all(used == width for used in layer_widths):
        return nn.functional.layer_norm(states, (width,))
    layers = [nn.functional.layer_norm(states[:, h, :, :used], (used,)) for h, used in enumerate(layer_widths)]
    return torch.stack([nn.functional.pad(layer, (0, width - layer.shape[-1])) for layer in layers], dim=1)


def stacking(encoder_rate: float, frame_rate: float, name: str) -> tuple[int, int]:
    """Number of encoder frames in one adapter frame, and of repetitions of each; one of the two is 1. Rates in Hz.
    Raises ConfigError: neither rate is a whole multiple of the other; names rates that fit encoder ``name``."""
    for high, low, up in ((encoder_rate, frame_rate, False), (frame_rate, encoder_rate, True)):
        factor = round(high / low)
        if factor >= 1 and math.isclose(high / low, factor, rel_tol=1e-6):
            return (1, factor) if up else (factor, 1)
    nearest = max(1, round(encoder_rate / frame_rate))
    fitting = [f"{encoder_rate / factor:.6g}" for factor in range(max(1, nearest - 2), nearest + 3)]
    raise ConfigError(
        f"frame_rate: {frame_rate:g} Hz does not fit encoder {name!r} with {encoder_rate:g} Hz: one must be a whole "
        f"multiple of the other. For this encoder {', '.join(fitting)} Hz would fit; all encoders share one rate"
    )


class FrameStackingAdapter(nn.Module):
    """Stacks neighbouring frames (or repeats frames of a slow encoder), then a two-layer MLP with GELU.

    Args:
        width_in: D of the encoder.
        width_out: D of the LLM.
        encoder_rate: Hz.
        frame_rate: Hz of the result.
        name: of the encoder, for messages.
        hidden_width: of the MLP; None for ``width_out``.
        output_norm: layer normalisation of the result, so that no encoder dominates the others by its scale.

    Raises ConfigError: the rates do not fit, or an option is out of its range.
    """

    # The MLP starts with outputs of variance one, which this hardly changes. It bounds the gradient of frames that
    # are all zero (an encoder that stops before the clip does), which 1/std would multiply by hundreds.
    norm_eps = 1e-2

    def __init__(
        self,
        width_in: int,
        width_out: int,
        encoder_rate: float,
        frame_rate: float,
        name: str,
        hidden_width: int | None = None,
        output_norm: bool = True,
    ) -> None:
        super().__init__()
        self.stack, self.repeat = stacking(encoder_rate, frame_rate, name)
        hidden = width_out if hidden_width is None else hidden_width
        check_number(hidden, "adapter_conf.hidden_width", at_least=1, whole=True)
        first, second = nn.Linear(self.stack * width_in, hidden), nn.Linear(hidden, width_out)
        self.mlp = nn.Sequential(first, nn.GELU(), second)
        self.norm = nn.LayerNorm(width_out, eps=self.norm_eps) if output_norm else nn.Identity()
        # Unit-variance input gives unit-variance output; GELU of a standard normal has a mean square of 0.425.
        nn.init.normal_(first.weight, std=first.in_features**-0.5)
        nn.init.normal_(second.weight, std=(0.425 * second.in_features) ** -0.5)
        nn.init.zeros_(first.bias)
        nn.init.zeros_(second.bias)

    def forward(self, hidden: Tensor, num_frames: int) -> Tensor:
        """(B,T,D_in), zero beyond each utterance's frames -> (B,U,D_out), U = ``num_frames``, cut or filled up."""
        # Frames of a slow encoder are computed once and repeated then.
        missing = -(-num_frames // self.repeat) * self.stack - hidden.shape[1]
        hidden = nn.functional.pad(hidden, (0, 0, 0, missing))  # a negative number cuts
        stream = self.norm(self.mlp(hidden.unflatten(1, (-1, self.stack)).flatten(2)))
        return stream.repeat_interleave(self.repeat, dim=1)[:, :num_frames] if self.repeat > 1 else stream
