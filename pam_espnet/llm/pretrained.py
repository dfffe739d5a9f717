"""Where a pretrained LLM comes from: a folder or a Hugging Face id, its tokenizer, its precision."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from pam_espnet.errors import ConfigError


def load_tokenizer(
    path_or_id: str, revision: str | None = None, local_files_only: bool = False, chat_template: str | None = None
) -> Any:
    """The LLM's own tokenizer, from a folder or id; ``chat_template`` (Jinja text or file) replaces its template.

    Raises:
        ConfigError: no such folder or id.
    """
    from transformers import AutoTokenizer

    source = hub_source(path_or_id, revision, local_files_only)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_id, **source)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"cannot load the tokenizer of {path_or_id!r}: {error}") from error
    if chat_template is not None:
        is_file = "\n" not in chat_template and os.path.isfile(chat_template)
        tokenizer.chat_template = Path(chat_template).read_text("utf-8") if is_file else chat_template
    return tokenizer


def hub_source(path_or_id: str, revision: str | None, local_files_only: bool) -> dict[str, Any]:
    """Options of transformers' ``from_pretrained`` that say where to look; for a folder nothing is fetched.

    Raises:
        ConfigError: a path that does not exist.
    """
    folder = _check_path(path_or_id)
    source: dict[str, Any] = {"local_files_only": folder or local_files_only}
    if revision is not None and not folder:
        source["revision"] = revision
    return source


def _check_path(path_or_id: str) -> bool:
    """True for a folder, False for what can be an id; a path that does not exist is an error."""
    if os.path.isdir(path_or_id):
        return True
    if path_or_id.count("/") > 1 or path_or_id.startswith((".", "/", "~")) or path_or_id.startswith("downloads"):
        raise ConfigError(
            f"the LLM folder {path_or_id} does not exist; make it with stage 1 of the recipe: "
            "./run.sh --stage 1 --stop_stage 1"
        )
    return False


def _has_bfloat16() -> bool:
    """Whether the device multiplies bfloat16 natively; a CPU that emulates it is slower than in float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def choose_dtype(name: str) -> torch.dtype:
    """Precision by name; "auto" is bfloat16 where the device computes it natively.

    Raises:
        ConfigError: another name.
    """
    if name == "auto":
        return torch.bfloat16 if _has_bfloat16() else torch.float32
    if name not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype must be 'auto', 'float32' or 'bfloat16', not {name!r}")
    return getattr(torch, name)
