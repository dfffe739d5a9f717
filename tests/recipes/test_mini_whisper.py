"""CTranslate2's Whisper file, written here from a tiny random model, and back."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipe_modules import mini_converter

from pam_espnet.errors import DataError

ct2_whisper = mini_converter("ct2_whisper")

SPECIAL = (
    *("endoftext", "startoftranscript", "en", "de", "translate", "transcribe"),
    *("startoflm", "startofprev", "nocaptions", "notimestamps"),
)
TYPES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


def convert(source: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    ct2_whisper.convert(source, out)


def _tiny_whisper() -> Any:
    """2 + 1 blocks of width 16, outputs that depend on every weight, vocabulary of 256 bytes and special tokens."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=256 + len(SPECIAL) + 4,
        num_mel_bins=20,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=48,
        max_source_positions=150,
        max_target_positions=20,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 256),
        decoder_start_token_id=257,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _variables(model: Any) -> dict[str, np.ndarray]:
    """The model's weights under CTranslate2's names, q, k and v stacked."""
    state = {name.removeprefix("model."): tensor.numpy() for name, tensor in model.state_dict().items()}
    named = {
        "decoder/embeddings/weight": state["decoder.embed_tokens.weight"],
        "encoder/num_heads": np.int16(model.config.encoder_attention_heads),
        "decoder/num_heads": np.int16(model.config.decoder_attention_heads),
        "decoder/scale_embeddings": np.int8(0),
    }

    def put(theirs: str, ours: str, words: tuple[str, str] = ("weight", "bias")) -> None:
        for word, kind in zip(words, ("weight", "bias"), strict=True):
            named[f"{theirs}/{word}"] = state[f"{ours}.{kind}"]

    def put_norm(theirs: str, ours: str) -> None:
        put(theirs, ours, ("gamma", "beta"))

    def put_stacked(theirs: str, ours: str, parts: str) -> None:
        weights = [state[f"{ours}.{part}_proj.weight"] for part in parts]
        biases = [np.zeros(16, np.float32) if part == "k" else state[f"{ours}.{part}_proj.bias"] for part in parts]
        named[f"{theirs}/weight"], named[f"{theirs}/bias"] = np.concatenate(weights), np.concatenate(biases)

    put("encoder/conv1", "encoder.conv1")
    put("encoder/conv2", "encoder.conv2")
    for side, count in (("encoder", 2), ("decoder", 1)):
        named[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        put_norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for index in range(count):
            theirs, ours = f"{side}/layer_{index}", f"{side}.layers.{index}"
            put_norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            put_stacked(f"{theirs}/self_attention/linear_0", f"{ours}.self_attn", "qkv")
            put(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            put_norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            put(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            put(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
    theirs, ours = "decoder/layer_0/attention", "decoder.layers.0.encoder_attn"
    put_norm(f"{theirs}/layer_norm", f"{ours}_layer_norm")
    put(f"{theirs}/linear_0", f"{ours}.q_proj")
    put_stacked(f"{theirs}/linear_1", ours, "kv")
    put(f"{theirs}/linear_2", f"{ours}.out_proj")
    return named


def _string(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def _write(folder: Path, variables: dict[str, np.ndarray], spec: str = "WhisperSpec", version: int = 6) -> Path:
    """``model.bin`` with the tokenizer and CTranslate2's config beside it."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    data = struct.pack("<I", version) + _string(spec) + struct.pack("<II", 3, len(variables))
    for name, value in variables.items():
        array = np.asarray(value)
        header = struct.pack("<B", array.ndim) + struct.pack(f"<{array.ndim}I", *array.shape)
        data += _string(name) + header + struct.pack("<BI", TYPES[array.dtype.name], array.nbytes) + array.tobytes()
    data += struct.pack("<I", 1) + _string("decoder/projection/weight") + _string("decoder/embeddings/weight")
    folder.mkdir()
    (folder / "model.bin").write_bytes(data)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"suppress_ids": [1, 2], "suppress_ids_begin": [256], "alignment_heads": [[0, 1]], "lang_ids": [258]}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder / "model.bin"


def _outputs(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    mel, tokens = torch.randn(2, 20, 300), torch.randint(0, 256, (2, 7))
    with torch.no_grad():
        return model(input_features=mel, decoder_input_ids=tokens).logits


def _as(variables: dict[str, np.ndarray], dtype: type) -> dict[str, np.ndarray]:
    return {name: value.astype(dtype) if value.dtype == np.float32 else value for name, value in variables.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float16, 1e-2)])
def test_outputs_are_equal(tmp_path: Path, dtype: type, tolerance: float) -> None:
    from safetensors.torch import load_file
    from transformers import WhisperForConditionalGeneration

    model = _tiny_whisper()
    convert(_write(tmp_path / "source", _as(_variables(model), dtype)), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32 if dtype is np.float32 else torch.float16}
    back = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert back.dtype == torch.float32
    expected = _outputs(model)
    assert expected.std() > 0.1
    torch.testing.assert_close(_outputs(back), expected, atol=tolerance, rtol=tolerance)


def test_pipeline_of_transformers_loads_the_folder(tmp_path: Path) -> None:
    """Tokenizer, feature extractor and generation settings are all there; random weights still give some text."""
    from transformers import pipeline

    convert(_write(tmp_path / "source", _variables(_tiny_whisper())), tmp_path / "out")
    recogniser = pipeline("automatic-speech-recognition", model=str(tmp_path / "out"))
    settings = recogniser.model.generation_config
    assert (settings.suppress_tokens, settings.begin_suppress_tokens) == ([1, 2], [256])
    assert (settings.eos_token_id, settings.decoder_start_token_id, settings.no_timestamps_token_id) == (256, 257, 265)
    assert settings.is_multilingual is False and settings.alignment_heads == [[0, 1]]
    extractor = recogniser.feature_extractor
    assert (extractor.feature_size, extractor.sampling_rate) == (20, 16000)
    mel = torch.randn(1, 20, 300)
    tokens = recogniser.model.generate(mel, max_new_tokens=5)
    assert isinstance(recogniser.tokenizer.decode(tokens[0], skip_special_tokens=True), str)


def test_truncated_anywhere(tmp_path: Path) -> None:
    source = _write(tmp_path / "source", _variables(_tiny_whisper()))
    whole = source.read_bytes()
    for size in (0, 3, 17, 40, len(whole) // 2, len(whole) - 100):
        source.write_bytes(whole[:size])
        with pytest.raises(DataError, match="truncated"):
            convert(source, tmp_path / "out")


def test_sizes_that_contradict(tmp_path: Path) -> None:
    source = _write(tmp_path / "source", {"encoder/conv1/bias": np.zeros(4, np.float32)})
    data = bytearray(source.read_bytes())
    at = data.index(struct.pack("<BI", 0, 16))
    data[at + 1 : at + 5] = struct.pack("<I", 8)
    source.write_bytes(data)
    with pytest.raises(DataError, match="contradict"):
        ct2_whisper.read_ct2(source)


def test_other_models_and_versions(tmp_path: Path) -> None:
    for index, options in enumerate(({"spec": "TransformerSpec"}, {"version": 3}, {"version": 99})):
        source = _write(tmp_path / str(index), {}, **options)
        with pytest.raises(DataError, match="no CTranslate2 Whisper model"):
            convert(source, tmp_path / "out")


def test_missing_variable_and_tokenizer(tmp_path: Path) -> None:
    variables = _variables(_tiny_whisper())
    lacking = {name: value for name, value in variables.items() if name != "encoder/layer_1/ffn/linear_1/bias"}
    with pytest.raises(DataError, match="encoder/layer_1/ffn/linear_1/bias"):
        convert(_write(tmp_path / "one", lacking), tmp_path / "out")
    source = _write(tmp_path / "two", variables)
    source.with_name("tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        convert(source, tmp_path / "out")
