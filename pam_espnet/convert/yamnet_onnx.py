"""YAMNet from a quantised ONNX graph (package ``sead``) -> folder for ``pam_espnet.frontend.encoders.yamnet``.

The graph simulates 8-bit arithmetic: pairs of QuantizeLinear and DequantizeLinear stand around float32 weights. The
pairs are left out, so the converted network is the float one.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pam_espnet.convert.common import model_folder, save_model
from pam_espnet.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


def convert(source: Path, out: Path, licence: str) -> None:
    """Read weights, channels and strides of the 27 convolutions in the graph's order.

    The classifier behind them is left out: the encoder has no use for it.

    Args:
        source: ``YamNet_w8a8.onnx.zip`` of the package (the graph and its weights' file), or an ``.onnx`` file whose
            weights lie inside it or beside it.
        out: folder to make.
        licence: text of the model's licence (Apache-2.0, TensorFlow Models).

    Raises:
        DataError: no such file, or not this graph.
        ConfigError: no licence text.
    """
    with (
        model_folder(out, source=source, licence=licence, source_format="yamnet-onnx") as folder,
        tempfile.TemporaryDirectory() as scratch,
    ):
        tensors, channels, strides = read_graph(_unzip(source, Path(scratch)))
        save_model(
            folder,
            tensors,
            {"model_type": "yamnet", "sample_rate": 16000, "channels": channels, "strides": strides},
        )


def read_graph(path: Path) -> tuple[dict[str, Tensor], list[int], list[int]]:
    """Tensors by the names of ``YAMNet``'s parameters, channels and strides of its blocks.

    Raises:
        DataError: not an ONNX file, or its convolutions are not: one, then pairs of depthwise and pointwise.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(path).graph
    except (DecodeError, OSError, onnx.checker.ValidationError) as error:
        raise DataError(path, f"cannot be read as ONNX: {error}") from error
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    if len(convolutions) % 2 == 0:
        raise DataError(path, f"{len(convolutions)} convolutions, expected one and then pairs of two")
    tensors: dict[str, Tensor] = {}
    channels, strides = [], []
    for index, node in enumerate(convolutions):
        block, pointwise = divmod(index - 1, 2)
        name = f"{'pointwise' if pointwise else 'depthwise'}.{block}" if index else "first"
        weight, bias = (_stored(graph, node.input[i], path) for i in (1, 2))
        tensors |= {f"{name}.weight": weight, f"{name}.bias": bias}
        attributes = {attribute.name: attribute for attribute in node.attribute}
        depthwise = index > 0 and not pointwise
        if attributes["group"].i != (weight.shape[0] if depthwise else 1):
            raise DataError(path, f"convolution {node.name} is not the {name} of a depthwise-separable network")
        if not pointwise or not index:
            strides.append(attributes["strides"].ints[0])
        if pointwise or not index:
            channels.append(weight.shape[0])
    return tensors, channels, strides


def _stored(graph: Any, name: str, path: Path) -> Tensor:
    """The float32 initializer that ``name`` leads back to through quantising nodes."""
    import torch
    from onnx import numpy_helper

    inputs = {
        node.output[0]: node.input[0] for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    }
    while name in inputs:
        name = inputs[name]
    found = next((item for item in graph.initializer if item.name == name), None)
    if found is None:
        raise DataError(path, f"{name} is computed by the graph, not stored in it")
    tensor = torch.from_numpy(numpy_helper.to_array(found).copy())
    if tensor.dtype != torch.float32:
        raise DataError(path, f"{name} is stored as {tensor.dtype}, expected float32 weights between quantising nodes")
    return tensor


def _unzip(source: Path, scratch: Path) -> Path:
    """The one ``.onnx`` file of a zip archive, its neighbours beside it; ``source`` itself if it is no archive."""
    if not zipfile.is_zipfile(source):
        return source
    with zipfile.ZipFile(source) as archive:
        graphs = [name for name in archive.namelist() if name.endswith(".onnx")]
        if len(graphs) != 1:
            raise DataError(source, f"holds {len(graphs)} .onnx files, expected one")
        archive.extractall(scratch)  # zipfile drops absolute paths and '..'
        return scratch / graphs[0]
