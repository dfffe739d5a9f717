"""Converter of CTranslate2's Whisper, English-only (as faster-whisper ships it), to a Hugging Face folder.

``model.bin``, little-endian: u32 format version, string spec name, u32 spec revision, u32 number of variables; then for
each variable its name (u16 length, bytes, a final NUL counted), u8 rank, u32 dimensions, u8 type, u32 number of bytes
and the data; then aliases, which no tensor here needs. Every length is checked against the file's end.

CTranslate2 stacks the q, k, v projections of self-attention (and k, v of cross-attention) into one matrix; Whisper's
k projection has no bias, so its third of the stacked bias is zero and left out here.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from model_files import AGAIN, check_fit

from pam_espnet.errors import DataError
from pam_espnet.fileio import read_json, write_json

VERSION, SPEC = 6, "WhisperSpec"
DTYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}


class Variables(dict[str, np.ndarray]):
    """The file's variables by name; a missing one is an error of the file."""

    def __init__(self, source: Path) -> None:
        super().__init__()
        self.source = source

    def __missing__(self, name: str) -> np.ndarray:
        raise DataError(self.source, f"variable {name!r} is missing")

    def layers(self, side: str) -> int:
        """Number of blocks of the encoder or decoder."""
        return sum(name.startswith(f"{side}/layer_") and name.endswith("/ffn/linear_0/weight") for name in self)


def read_ct2(path: Path) -> Variables:
    """All variables of a CTranslate2 Whisper file.

    Raises:
        DataError: not a Whisper model in the known version of the format, truncated, or sizes that contradict.
    """
    data, at = memoryview(path.read_bytes()), 0

    def take(size: int) -> memoryview:
        nonlocal at
        if at + size > len(data):
            left = len(data) - at
            raise DataError(path, f"truncated: {size} bytes expected at offset {at}, {left} are left", hint=AGAIN)
        at += size
        return data[at - size : at]

    def number(code: str) -> int:
        return int(struct.unpack("<" + code, take(struct.calcsize("<" + code)))[0])

    def string() -> str:
        return bytes(take(number("H"))).rstrip(b"\0").decode("utf-8", errors="replace")

    version, spec = number("I"), string()
    if (version, spec) != (VERSION, SPEC):
        message = f"no CTranslate2 Whisper model: version {version}, spec {spec[:40]!r}; known is {VERSION}, {SPEC!r}"
        raise DataError(path, message)
    number("I")  # revision of the spec: the names below are checked one by one instead
    variables = Variables(path)
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        raw = take(size)
        if kind not in DTYPES or size != np.dtype(DTYPES[kind]).itemsize * int(np.prod(shape, dtype=np.int64)):
            message = f"variable {name!r}: type {kind}, shape {shape} and {size} bytes contradict each other"
            raise DataError(path, message, hint=AGAIN)
        variables[name] = np.frombuffer(raw, DTYPES[kind]).reshape(shape)
    return variables


def convert(source: Path, folder: Path) -> None:
    """Write a folder that transformers' Whisper classes and pipeline load.

    Tensors keep the file's precision (float16), while ``config.json`` asks for float32, so that ``from_pretrained``
    widens them.

    Args:
        source: ``model.bin``; ``tokenizer.json`` and CTranslate2's ``config.json`` lie beside it.
        folder: an empty folder.

    Raises:
        DataError: ``source`` is damaged, is another kind of model, or a file beside it is missing.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    variables = read_ct2(source)
    sizes = _sizes(variables)
    generation = _generation(source, sizes["max_target_positions"])
    _write_tokenizer(source, folder)
    special = {key: generation[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = WhisperConfig(
        architectures=["WhisperForConditionalGeneration"],
        dtype="float32",
        **sizes,
        **special,
        decoder_start_token_id=generation["decoder_start_token_id"],
    )
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in _hugging_face_names(variables)}
    check_fit(source, WhisperForConditionalGeneration, config, tensors, tied="proj_out.weight")
    config.save_pretrained(folder)
    GenerationConfig(**generation).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _sizes(variables: Variables) -> dict[str, int]:
    """The sizes of WhisperConfig, read off the shapes of the variables."""
    width, mels, _ = variables["encoder/conv1/weight"].shape
    sizes = {"d_model": width, "num_mel_bins": mels, "vocab_size": variables["decoder/embeddings/weight"].shape[0]}
    for side, positions in (("encoder", "max_source_positions"), ("decoder", "max_target_positions")):
        sizes[f"{side}_layers"] = variables.layers(side)
        sizes[f"{side}_attention_heads"] = int(variables[f"{side}/num_heads"])
        sizes[f"{side}_ffn_dim"] = variables[f"{side}/layer_0/ffn/linear_0/weight"].shape[0]
        sizes[positions] = variables[f"{side}/position_encodings/encodings"].shape[0]
    return sizes


def _hugging_face_names(variables: Variables) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor under its Hugging Face name."""

    def affine(theirs: str, ours: str) -> Iterator[tuple[str, np.ndarray]]:
        yield f"{ours}.weight", variables[f"{theirs}/weight"]
        yield f"{ours}.bias", variables[f"{theirs}/bias"]

    def norm(theirs: str, ours: str) -> Iterator[tuple[str, np.ndarray]]:
        yield f"{ours}.weight", variables[f"{theirs}/gamma"]
        yield f"{ours}.bias", variables[f"{theirs}/beta"]

    def stacked(theirs: str, ours: str, parts: str) -> Iterator[tuple[str, np.ndarray]]:
        weights = np.split(variables[f"{theirs}/weight"], len(parts))
        biases = np.split(variables[f"{theirs}/bias"], len(parts))
        for part, weight, bias in zip(parts, weights, biases, strict=True):
            yield f"{ours}.{part}_proj.weight", weight
            if part != "k":
                yield f"{ours}.{part}_proj.bias", bias

    yield from affine("encoder/conv1", "model.encoder.conv1")
    yield from affine("encoder/conv2", "model.encoder.conv2")
    yield "model.decoder.embed_tokens.weight", variables["decoder/embeddings/weight"]
    for side in ("encoder", "decoder"):
        yield f"model.{side}.embed_positions.weight", variables[f"{side}/position_encodings/encodings"]
        yield from norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for index in range(variables.layers(side)):
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


def _beside(source: Path, name: str) -> Path:
    path = source.with_name(name)
    if not path.is_file():
        raise DataError(path, "has to be beside model.bin", hint="unpack the whole package")
    return path


def _write_tokenizer(source: Path, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    (folder / "tokenizer.json").write_bytes(_beside(source, "tokenizer.json").read_bytes())
    settings = {"tokenizer_class": "WhisperTokenizer", "model_max_length": 1024, "clean_up_tokenization_spaces": False}
    roles = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    write_json(folder / "tokenizer_config.json", {**settings, **roles})


def _generation(source: Path, max_length: int) -> dict[str, Any]:
    """The generation settings of transformers' Whisper, from the special tokens and CTranslate2's config."""
    tokenizer = _beside(source, "tokenizer.json")
    tokens = {token["content"]: int(token["id"]) for token in read_json(tokenizer)["added_tokens"]}
    given = read_json(_beside(source, "config.json"))
    try:
        end = tokens["<|endoftext|>"]
        return {
            "bos_token_id": end,
            "eos_token_id": end,
            "pad_token_id": end,
            "decoder_start_token_id": tokens["<|startoftranscript|>"],
            "prev_sot_token_id": tokens["<|startofprev|>"],
            "no_timestamps_token_id": tokens["<|notimestamps|>"],
            "max_length": max_length,
            "max_initial_timestamp_index": 50,
            "is_multilingual": False,
            "suppress_tokens": given["suppress_ids"],
            "begin_suppress_tokens": given["suppress_ids_begin"],
            "alignment_heads": given["alignment_heads"],
        }
    except KeyError as error:
        raise DataError(source, f"tokenizer.json or config.json beside it has no {error}", hint=AGAIN) from error
