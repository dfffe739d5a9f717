"""Converter of an LLM in one GGUF file (llama.cpp, any quantisation) to a Hugging Face folder, by transformers' reader.

Weights are de-quantised. The tokenizer is rebuilt from the vocabulary in the file, special tokens and chat template
with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model_files import AGAIN

from pam_espnet.errors import DataError

# Architecture and kind of tokenizer. transformers does not read the latter, so one that splits text in a way of its own
# would be wrong without a word; SmolLM2's separates digits, of which its vocabulary has no pairs anyway.
KNOWN = {("llama", "smollm"), ("gemma3", "default")}


def convert(source: Path, folder: Path) -> None:
    """Write an LLM with its tokenizer.

    Weights are stored in float16, while ``config.json`` asks for float32, so that ``from_pretrained`` widens them.

    Args:
        source: the ``.gguf`` file.
        folder: an empty folder.

    Raises:
        DataError: ``source`` is truncated, or of another architecture or tokenizer than the known ones.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    _check(source)
    where: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    read = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
    config = type(read.config).from_dict(read.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # else the folder is taken for a GGUF file
    llm = type(read)(config)
    llm.load_state_dict(read.state_dict())
    special = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    llm.generation_config = GenerationConfig(**special)
    llm.half().save_pretrained(folder)
    config.dtype = torch.float32
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, **where).save_pretrained(folder)


def _check(source: Path) -> None:
    from gguf import GGUFReader

    try:
        fields = {name: field.contents() for name, field in GGUFReader(source).fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise DataError(source, f"not a whole GGUF file ({error})", hint=AGAIN) from error
    found = tuple(fields.get(key) for key in ("general.architecture", "tokenizer.ggml.pre"))
    if found not in KNOWN:
        known = ", ".join("/".join(pair) for pair in sorted(KNOWN))
        raise DataError(source, f"architecture and tokenizer {found[0]!r}/{found[1]!r}: not known; known: {known}")
