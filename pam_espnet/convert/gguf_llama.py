"""A Llama-architecture model in one GGUF file (llama.cpp, any quantisation gguf knows) to a Hugging Face folder.

Weights are de-quantised; the rows of the q and k projections are put back from llama.cpp's order (the two halves of
each rotary pair side by side) to Hugging Face's (first halves, then second halves). The tokenizer is rebuilt from the
vocabulary and merges in the file, with the pre-tokenizer that the file names.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pam_espnet.convert.common import model_folder
from pam_espnet.errors import DataError
from pam_espnet.fileio import write_json

if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor
    from transformers import LlamaConfig

FORMAT = "gguf-llama"
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# name of the pre-tokenizer in the file -> whether every digit is a token of its own
_PRE_TOKENIZERS = {"smollm": True, "gpt-2": False}
_CONTROL, _USER_DEFINED = 3, 4  # token types


class _Fields:
    """The key-value part of a GGUF file; a missing key is an error of the file."""

    def __init__(self, source: Path, reader: GGUFReader) -> None:
        self._source = source
        self._fields = reader.fields

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise DataError(self._source, f"no key {key!r} in the GGUF header")
        return self._fields[key].contents()


def convert(source: Path, out: Path, licence: str) -> None:
    """Write a Hugging Face folder with a LlamaForCausalLM, its tokenizer and its chat template.

    Weights are stored in float16, while ``config.json`` asks for float32, so that ``from_pretrained`` widens them.

    Args:
        source: the ``.gguf`` file.
        out: the folder to make.
        licence: text of the model's licence.

    Raises:
        DataError: ``source`` is truncated, no Llama model, or has a tokenizer this converter does not know.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    source = Path(source)
    with model_folder(Path(out), source=source, licence=licence, source_format=FORMAT) as folder:
        try:
            reader = GGUFReader(source)
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise DataError(
                source,
                f"not a whole GGUF file ({error})",
                hint="delete it and run the recipe's stage 1 again: it downloads and verifies the package",
            ) from error
        fields = _Fields(source, reader)
        if fields["general.architecture"] != "llama" or "llama.rope.scaling.type" in fields:
            raise DataError(source, f"architecture {fields['general.architecture']!r}: only plain llama is converted")
        tensors = _tensors(source, reader, fields)
        config = _config(fields, tied="lm_head.weight" not in tensors)
        _check_names(source, config, tensors)
        _write_tokenizer(source, fields, folder)
        config.save_pretrained(folder)
        GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        ).save_pretrained(folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _tensors(source: Path, reader: GGUFReader, fields: _Fields) -> dict[str, Tensor]:
    """Every weight, float16, under its Hugging Face name."""
    import torch
    from gguf import dequantize

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        *block, part, kind = tensor.name.split(".")
        if tensor.name == "rope_freqs.weight":
            continue  # derived from the rope settings in the header
        if kind != "weight" or part not in (_BLOCK_NAMES if block else _TOP_NAMES):
            raise DataError(source, f"unknown tensor {tensor.name!r}")
        weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if part in heads:
            rows, columns = weight.shape
            paired = weight.reshape(heads[part], rows // heads[part] // 2, 2, columns)
            weight = paired.swapaxes(1, 2).reshape(rows, columns)
        name = f"model.layers.{block[1]}.{_BLOCK_NAMES[part]}" if block else _TOP_NAMES[part]
        tensors[f"{name}.weight"] = torch.from_numpy(weight.astype(np.float16))
    return tensors


def _config(fields: _Fields, *, tied: bool) -> LlamaConfig:
    from transformers import LlamaConfig

    width, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    end = fields["tokenizer.ggml.eos_token_id"]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=width,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=width // heads,
        max_position_embeddings=fields["llama.context_length"],
        # Through the shortest decimal of the float32 in the file: 1e-05, not 9.999999747378752e-06.
        rms_norm_eps=float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        rope_parameters={"rope_type": "default", "rope_theta": float(fields["llama.rope.freq_base"])},
        tie_word_embeddings=tied,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=end,
        pad_token_id=_padding(fields),
    )


def _padding(fields: _Fields) -> int:
    key = "tokenizer.ggml.padding_token_id"
    return int(fields[key] if key in fields else fields["tokenizer.ggml.eos_token_id"])


def _check_names(source: Path, config: LlamaConfig, tensors: dict[str, Tensor]) -> None:
    """Raise DataError unless names and shapes are exactly those of transformers' model."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        expected = LlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    wrong = sorted(
        name
        for name in expected.keys() | tensors.keys()
        if name not in expected or name not in tensors or expected[name].shape != tensors[name].shape
    )
    if wrong:
        raise DataError(source, f"does not fit transformers' Llama: {', '.join(wrong[:5])} ({len(wrong)} in all)")


def _write_tokenizer(source: Path, fields: _Fields, folder: Path) -> None:
    """Write tokenizer.json (byte-level BPE) and tokenizer_config.json (special tokens, chat template)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pre = fields["tokenizer.ggml.pre"]
    if fields["tokenizer.ggml.model"] != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise DataError(
            source,
            f"tokenizer {fields['tokenizer.ggml.model']!r} with pre-tokenizer {pre!r}; "
            f"known are gpt2 with {', '.join(_PRE_TOKENIZERS)}",
        )
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if _PRE_TOKENIZERS[pre] else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ == kind
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[_padding(fields)],
    }
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    write_json(folder / "tokenizer_config.json", settings)
