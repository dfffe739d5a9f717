"""Converter of YAMNet, a quantised ONNX graph (package ``sead``), to a folder for ``frontend/encoders/yamnet.py``.

The graph simulates 8-bit arithmetic: pairs of QuantizeLinear and DequantizeLinear stand around float32 weights. The
pairs are left out: the converted network is the float one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_files import save_model

from pam_espnet.data.archives import extract_zip
from pam_espnet.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


def convert(source: Path, folder: Path) -> None:
    """Read weights, channels and strides of the 27 convolutions in the graph's order; the classifier is left out.

    Args:
        source: ``YamNet_w8a8.onnx.zip``: the graph, its weights' file beside it.
        folder: an empty folder.

    Raises:
        DataError: not this graph.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tensors, channels, strides = read_graph(_unzip(source, Path(scratch)))
    network = {"channels": channels, "strides": strides}
    save_model(folder, tensors, {"model_type": "yamnet", "sample_rate": 16000, **network})


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
    """The one ``.onnx`` file of a zip archive, unpacked with its neighbours."""
    extract_zip(source, scratch)
    graphs = sorted(scratch.rglob("*.onnx"))
    if len(graphs) != 1:
        raise DataError(source, f"holds {len(graphs)} .onnx files, expected one")
    return graphs[0]
