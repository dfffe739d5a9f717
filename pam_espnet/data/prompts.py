"""Prompt files: several wordings of one question, one per line; the first is the one that scoring asks.

Empty lines and lines that begin with ``#`` are skipped. A wording may have fields, such as ``{number}``.
"""

from __future__ import annotations

import string
from collections.abc import Collection
from pathlib import Path

from pam_espnet.data.rendering import seeded
from pam_espnet.errors import DataError


def read_prompts(path: str | Path, fields: Collection[str] = ()) -> list[str]:
    """The wordings of a prompt file.

    Args:
        path: the file.
        fields: names that every wording must have as ``{name}``, and no others.

    Raises:
        DataError: no such file, no wording in it, one that is there twice, or fields that do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(path, "no such prompt file", hint="write it: one wording per line, the one for scoring first")
    prompts: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        prompt = " ".join(line.split())
        if not prompt or prompt.startswith("#"):
            continue
        if prompt in prompts:
            raise DataError(path, f"{prompt!r} is there twice", line=number, hint="remove one of the two lines")
        try:
            found = {name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None}
        except ValueError as error:
            raise DataError(path, f"{prompt!r}: {error}", line=number, hint="write {{ for a brace") from error
        if found != set(fields):
            wanted = " and ".join(f"{{{name}}}" for name in fields) or "no {field}"
            raise DataError(path, f"{prompt!r} must have {wanted}", line=number, hint="correct the line")
        prompts.append(prompt)
    if not prompts:
        raise DataError(path, "has no wording", hint="write one per line, the one for scoring first")
    return prompts


def draw_prompt(prompts: list[str], key: str, seed: int) -> str:
    """The wording that belongs to ``key``: any of ``prompts``, the same whenever ``seed`` is."""
    return prompts[int(seeded(seed, f"prompt {key}").integers(len(prompts)))]
