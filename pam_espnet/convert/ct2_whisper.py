"""Whisper from CTranslate2's ``model.bin`` (as faster-whisper ships it) to a Hugging Face folder.

The file, little-endian: u32 format version, string spec name, u32 spec revision, u32 number of variables; then for
each variable its name (u16 length, bytes, a final NUL counted), u8 rank, u32 dimensions, u8 type, u32 number of bytes
and the data; then u32 number of aliases, each a pair of names (alias, variable). Read as data alone: every length is
checked against the file's end and nothing in it is executed.

CTranslate2 stacks the q, k, v projections of self-attention (and k, v of cross-attention) into one matrix; Whisper's
k projection has no bias, so its third of the stacked bias is zero and left out here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pam_espnet.convert.common import model_folder
from pam_espnet.errors import DataError
from pam_espnet.fileio import read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import WhisperConfig

FORMAT = "ct2-whisper"
_VERSIONS = (4, 5, 6)  # the first three versions stored an item size where these store a type
_BFLOAT16 = 5
_DTYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2", _BFLOAT16: "<u2"}
_MULTILINGUAL_VOCAB = 51865  # English-only models have one token less


class _Reader:
    """A cursor over a file's bytes that refuses to read beyond their end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = memoryview(path.read_bytes())
        self.at = 0

    def take(self, size: int) -> memoryview:
        if self.at + size > len(self.data):
            raise DataError(
                self.path,
                f"truncated: {size} bytes expected at offset {self.at}, {len(self.data) - self.at} are left",
                hint="delete it and run the recipe's stage 1 again: it downloads and verifies the package",
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> int:
        return int(struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0])

    def string(self) -> str:
        return bytes(self.take(self.number("H"))).rstrip(b"\0").decode("utf-8", errors="replace")


def read_ct2(path: Path) -> dict[str, np.ndarray]:
    """All variables of a CTranslate2 Whisper file by name (aliases too); bfloat16 is widened to float32.

    Raises:
        DataError: not a Whisper model in a known version of the format, truncated, or sizes that contradict.
    """
    reader = _Reader(path)
    version, spec = reader.number("I"), reader.string()
    if version not in _VERSIONS or spec != "WhisperSpec":
        raise DataError(
            path, f"no CTranslate2 Whisper model (version {version}, spec {spec[:40]!r}); known versions {_VERSIONS}"
        )
    reader.number("I")  # revision of the spec: the names below are checked one by one instead
    variables: dict[str, np.ndarray] = {}
    for _ in range(reader.number("I")):
        name = reader.string()
        shape = [reader.number("I") for _ in range(reader.number("B"))]
        kind, size = reader.number("B"), reader.number("I")
        raw = reader.take(size)
        if kind not in _DTYPES or size != np.dtype(_DTYPES[kind]).itemsize * int(np.prod(shape, dtype=np.int64)):
            raise DataError(
                path, f"variable {name!r}: type {kind}, shape {shape} and {size} bytes contradict each other"
            )
        array = np.frombuffer(raw, _DTYPES[kind]).reshape(shape)
        if kind == _BFLOAT16:
            array = (array.astype(np.uint32) << 16).view(np.float32)
        variables[name] = array
    for _ in range(reader.number("I")):
        alias, target = reader.string(), reader.string()
        if target not in variables:
            raise DataError(path, f"alias {alias!r} of a variable {target!r} that is not in the file")
        variables[alias] = variables[target]
    return variables


def convert(source: Path, out: Path, licence: str) -> None:
    """Write a Hugging Face folder that transformers' Whisper classes and pipeline load from local files.

    Tensors keep the file's precision (float16 as a rule; int8 is scaled back to float32), while ``config.json`` asks
    for float32, so that ``from_pretrained`` widens them.

    Args:
        source: ``model.bin``; ``tokenizer.json`` and optionally CTranslate2's ``config.json`` lie beside it.
        out: the folder to make.
        licence: text of the model's licence.

    Raises:
        DataError: ``source`` is damaged, is another kind of model, or ``tokenizer.json`` is missing.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig, WhisperFeatureExtractor

    source = Path(source)
    with model_folder(Path(out), source=source, licence=licence, source_format=FORMAT) as folder:
        variables = read_ct2(source)
        config = _config(source, variables)
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in _hugging_face_names(source, variables)}
        generation = _generation(source, config, _write_tokenizer(source.with_name("tokenizer.json"), folder))
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
            setattr(config, key, generation[key])
        _check_names(source, config, tensors)
        config.save_pretrained(folder)
        GenerationConfig(**generation).save_pretrained(folder)
        WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _get(source: Path, variables: dict[str, np.ndarray], name: str) -> np.ndarray:
    """One variable, scaled back to float32 where it was quantised to integers."""
    if name not in variables:
        raise DataError(source, f"variable {name!r} is missing")
    array = variables[name]
    if array.dtype.kind == "i":
        if f"{name}_scale" not in variables:
            raise DataError(source, f"variable {name!r} is quantised but has no scale")
        scale = variables[f"{name}_scale"].astype(np.float32)
        array = array.astype(np.float32) / scale.reshape(scale.shape + (1,) * (array.ndim - scale.ndim))
    return array


def _layers(variables: dict[str, np.ndarray], side: str) -> int:
    return sum(1 for name in variables if name.startswith(f"{side}/layer_") and name.endswith("/ffn/linear_0/weight"))


def _config(source: Path, variables: dict[str, np.ndarray]) -> WhisperConfig:
    """All sizes, read off the shapes of the variables."""
    from transformers import WhisperConfig

    width, mels, _ = _get(source, variables, "encoder/conv1/weight").shape
    heads = {
        side: int(variables.get(f"{side}/num_heads", np.array(width // 64)).item()) for side in ("encoder", "decoder")
    }
    return WhisperConfig(
        architectures=["WhisperForConditionalGeneration"],
        dtype="float32",
        vocab_size=_get(source, variables, "decoder/embeddings/weight").shape[0],
        num_mel_bins=mels,
        d_model=width,
        encoder_layers=_layers(variables, "encoder"),
        decoder_layers=_layers(variables, "decoder"),
        encoder_attention_heads=heads["encoder"],
        decoder_attention_heads=heads["decoder"],
        encoder_ffn_dim=_get(source, variables, "encoder/layer_0/ffn/linear_0/weight").shape[0],
        decoder_ffn_dim=_get(source, variables, "decoder/layer_0/ffn/linear_0/weight").shape[0],
        max_source_positions=_get(source, variables, "encoder/position_encodings/encodings").shape[0],
        max_target_positions=_get(source, variables, "decoder/position_encodings/encodings").shape[0],
    )


def _hugging_face_names(source: Path, variables: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor under its Hugging Face name."""

    def get(name: str) -> np.ndarray:
        return _get(source, variables, name)

    def affine(theirs: str, ours: str) -> Iterator[tuple[str, np.ndarray]]:
        yield f"{ours}.weight", get(f"{theirs}/weight")
        yield f"{ours}.bias", get(f"{theirs}/bias")

    def norm(theirs: str, ours: str) -> Iterator[tuple[str, np.ndarray]]:
        yield f"{ours}.weight", get(f"{theirs}/gamma")
        yield f"{ours}.bias", get(f"{theirs}/beta")

    def stacked(theirs: str, ours: str, parts: str) -> Iterator[tuple[str, np.ndarray]]:
        weights = np.split(get(f"{theirs}/weight"), len(parts))
        biases = np.split(get(f"{theirs}/bias"), len(parts))
        for part, weight, bias in zip(parts, weights, biases, strict=True):
            yield f"{ours}.{part}_proj.weight", weight
            if part != "k":
                yield f"{ours}.{part}_proj.bias", bias

    yield from affine("encoder/conv1", "model.encoder.conv1")
    yield from affine("encoder/conv2", "model.encoder.conv2")
    yield "model.decoder.embed_tokens.weight", get("decoder/embeddings/weight")
    for side in ("encoder", "decoder"):
        yield f"model.{side}.embed_positions.weight", get(f"{side}/position_encodings/encodings")
        yield from norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for index in range(_layers(variables, side)):
            theirs, ours = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            yield from norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            yield from stacked(f"{theirs}/self_attention/linear_0", f"{ours}.self_attn", "qkv")
            yield from affine(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            if side == "decoder":
                yield from norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
                yield from affine(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                yield from stacked(f"{theirs}/attention/linear_1", f"{ours}.encoder_attn", "kv")
                yield from affine(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
            yield from norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            yield from affine(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            yield from affine(f"{theirs}/ffn/linear_1", f"{ours}.fc2")


def _check_names(source: Path, config: WhisperConfig, tensors: dict[str, Tensor]) -> None:
    """Raise DataError unless names and shapes are exactly those of transformers' model (output layer tied)."""
    import torch
    from transformers import WhisperForConditionalGeneration

    with torch.device("meta"):
        expected = WhisperForConditionalGeneration(config).state_dict()
    expected.pop("proj_out.weight")
    wrong = sorted(
        name
        for name in expected.keys() | tensors.keys()
        if name not in expected or name not in tensors or expected[name].shape != tensors[name].shape
    )
    if wrong:
        raise DataError(source, f"does not fit transformers' Whisper: {', '.join(wrong[:5])} ({len(wrong)} in all)")


def _write_tokenizer(path: Path, folder: Path) -> dict[str, int]:
    """Write tokenizer.json and tokenizer_config.json; return the special tokens' ids."""
    if not path.is_file():
        raise DataError(path, "the tokenizer has to lie beside model.bin", hint="unpack the whole package")
    (folder / "tokenizer.json").write_bytes(path.read_bytes())
    settings = {"tokenizer_class": "WhisperTokenizer", "model_max_length": 1024, "clean_up_tokenization_spaces": False}
    roles = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    write_json(folder / "tokenizer_config.json", {**settings, **roles})
    return {token["content"]: int(token["id"]) for token in read_json(path)["added_tokens"]}


def _generation(source: Path, config: WhisperConfig, tokens: dict[str, int]) -> dict[str, Any]:
    """The generation settings that transformers' Whisper needs, from the special tokens and CTranslate2's config."""
    try:
        end, start = tokens["<|endoftext|>"], tokens["<|startoftranscript|>"]
        settings: dict[str, Any] = {
            "bos_token_id": end,
            "eos_token_id": end,
            "pad_token_id": end,
            "decoder_start_token_id": start,
            "prev_sot_token_id": tokens["<|startofprev|>"],
            "no_timestamps_token_id": tokens["<|notimestamps|>"],
            "max_length": config.max_target_positions,
            "max_initial_timestamp_index": 50,
            "is_multilingual": config.vocab_size >= _MULTILINGUAL_VOCAB,
        }
        if settings["is_multilingual"]:
            first, last = start + 1, tokens["<|translate|>"]
            settings["lang_to_id"] = {name: index for name, index in tokens.items() if first <= index < last}
            settings["task_to_id"] = {name: tokens[f"<|{name}|>"] for name in ("transcribe", "translate")}
    except KeyError as error:
        raise DataError(source.with_name("tokenizer.json"), f"no special token {error}") from error
    theirs = source.with_name("config.json")
    if theirs.is_file():
        given = read_json(theirs)
        names = {
            "suppress_tokens": "suppress_ids",
            "begin_suppress_tokens": "suppress_ids_begin",
            "alignment_heads": "alignment_heads",
        }
        settings.update({ours: given[key] for ours, key in names.items() if key in given})
    return settings
