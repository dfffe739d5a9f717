"""Where a pretrained LLM comes from: a folder or the Hugging Face hub; its tokenizer; the precision of its weights."""

import logging
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pam_espnet.errors import ConfigError

CLEARLY_FASTER = 0.8  # bfloat16's time over float32's from which it is worth its rounding; measured: 0.6 and 1.6


def load_tokenizer(
    path_or_id: str, revision: str | None = None, local_files_only: bool = False, chat_template: str | None = None
) -> Any:
    """The LLM's own tokenizer, from a folder or id; ``chat_template`` (Jinja text or file) replaces its template.
    Raises ConfigError: no such folder or id."""
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
    """Options of transformers' ``from_pretrained`` that choose where to look; for a folder nothing is fetched.
    Raises ConfigError: a path that does not exist."""
    if os.path.isdir(path_or_id):
        return {"local_files_only": True}
    if path_or_id.count("/") > 1 or path_or_id.startswith((".", "/", "~", "downloads")):
        raise ConfigError(
            f"the LLM folder {path_or_id} does not exist; make it with stage 1 of the recipe: "
            "./run.sh --stage 1 --stop_stage 1"
        )
    return {"local_files_only": local_files_only, **({} if revision is None else {"revision": revision})}


def choose_dtype(name: str) -> torch.dtype:
    """Precision by name; "auto" is bfloat16 where the device computes it faster than float32: GPUs with native
    bfloat16, CPUs as measured. Raises ConfigError: another name."""
    if name not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"dtype must be 'auto', 'float32' or 'bfloat16', not {name!r}")
    if name == "auto":
        if torch.cuda.is_available():
            faster = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            faster = cpu_prefers_bfloat16()
        name = "bfloat16" if faster else "float32"
    return getattr(torch, name)


@cache
def cpu_prefers_bfloat16() -> bool:
    """Whether this CPU multiplies matrices clearly faster in bfloat16 than in float32: measured once a process, 0.1 s.

    That it has the instructions does not say so: some processors take 0.6 of the time with them, others, whose AMX is
    hidden, 1.6 times as long (tests/benchmarks/RESULTS.md).
    """
    if not torch.cpu.get_capabilities().get("avx512_bf16", False):
        return False  # emulated
    fastest = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows, weight = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            torch.nn.functional.linear(rows, weight)
            seconds.append(time.perf_counter() - started)
        fastest[dtype] = min(seconds)  # what other work on the machine slowed down least
    ratio = fastest[torch.bfloat16] / fastest[torch.float32]
    chosen = "bfloat16" if ratio < CLEARLY_FASTER else "float32"
    logging.info(f"bfloat16 takes {ratio:.2f} times as long as float32 here: dtype auto is {chosen}")
    return chosen == "bfloat16"
