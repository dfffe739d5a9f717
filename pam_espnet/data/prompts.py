"""Prompt files: several wordings of one question, one per line; the first is the one for scoring.

Empty lines and lines that begin with ``#`` are skipped. A wording may have fields, such as ``{number}``.
"""

import re
import string
from collections.abc import Collection, Mapping
from pathlib import Path

from pam_espnet.data.rendering import seeded
from pam_espnet.data.tables import read_lines
from pam_espnet.data.tasks import task_spec
from pam_espnet.errors import DataError


def read_prompts(path: str | Path, fields: Collection[str] | None = ()) -> list[str]:
    """The wordings of a prompt file.

    Args:
        fields: names that every wording must have as ``{name}``, and no others; None: those of the first wording.

    Raises DataError: no such file, not UTF-8, no wording in it, one that is there twice, or fields that do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(path, "no such prompt file", hint="write it: one wording per line, the one for scoring first")
    prompts: list[str] = []
    for number, line in enumerate(read_lines(path), 1):
        prompt = " ".join(line.split())
        if not prompt or prompt.startswith("#"):
            continue
        if prompt in prompts:
            raise DataError(path, f"{prompt!r} is there twice", line=number, hint="remove one of the two lines")
        try:
            found = {name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None}
            if wrong := [name for name in found if not name.isidentifier()]:
                raise ValueError(f"{{{wrong[0]}}} is no {{field}}")
        except ValueError as error:
            raise DataError(path, f"{prompt!r}: {error}", line=number, hint="write {{ and }} for braces") from error
        fields = sorted(found) if fields is None else fields
        if found != set(fields):
            wanted = " and ".join(f"{{{name}}}" for name in fields) or "no {field}"
            raise DataError(path, f"{prompt!r} must have {wanted}", line=number, hint="correct the line")
        prompts.append(prompt)
    if not prompts:
        raise DataError(path, "has no wording", hint="write one per line, the one for scoring first")
    return prompts


class Wordings:
    """All wordings of one question, to ask another one of them than a data directory has.

    A prompt is recognised by the wording it was made from; the values of its fields are carried over.

    Raises DataError: as ``read_prompts``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.prompts = read_prompts(path, fields=None)
        self._patterns = [_pattern(prompt) for prompt in self.prompts]

    def __len__(self) -> int:
        return len(self.prompts)

    def recognise(self, prompt: str) -> tuple[int, dict[str, str]]:
        """(number of the wording, from 0; its fields) of a prompt.
        Raises DataError: the prompt was made from none of the wordings."""
        for number, pattern in enumerate(self._patterns):
            if found := pattern.fullmatch(prompt):
                return number, found.groupdict()
        hint = "put the wording into the file, or prepare the data again with this file (stage 1)"
        raise DataError(self.path, f"has no wording for the prompt {prompt!r}", hint=hint)

    def ask(self, prompt: str, number: int) -> str:
        """The wording ``number`` (from 0) of what ``prompt`` asks."""
        return self.prompts[number].format(**self.recognise(prompt)[1])

    def draw(self, prompt: str, key: str, seed: int, epoch: int) -> str:
        """Any wording of what ``prompt`` asks: one for each utterance ``key``, epoch and seed."""
        return self.ask(prompt, _draw(len(self), f"prompt {epoch} {key}", seed))


def read_wordings(files: Mapping[str, str | Path]) -> dict[str, Wordings]:
    """{task: prompt file} -> {task: its wordings}.
    Raises ConfigError: an unknown task; DataError: as ``read_prompts``."""
    return {task_spec(task).name: Wordings(path) for task, path in files.items()}


def _pattern(prompt: str) -> re.Pattern[str]:
    """What ``prompt`` may look like once its fields are filled in; a field that is there twice holds the same twice."""
    parts, seen = [], set()
    for literal, name, _, _ in string.Formatter().parse(prompt):
        parts.append(re.escape(literal))
        if name is not None:
            parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>.+?)")
            seen.add(name)
    return re.compile("".join(parts))


def _draw(count: int, name: str, seed: int) -> int:
    return int(seeded(seed, name).integers(count))


def draw_prompt(prompts: list[str], key: str, seed: int) -> str:
    """The wording that belongs to ``key``: any of ``prompts``, the same whenever ``seed`` is."""
    return prompts[_draw(len(prompts), f"prompt {key}", seed)]
