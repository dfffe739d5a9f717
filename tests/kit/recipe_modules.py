"""A recipe's ``local/*.py`` in tests: imported by their plain names, and working in the test's own process."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


@contextmanager
def local_modules(folder: Path, names: Sequence[str]) -> Iterator[SimpleNamespace]:
    """The modules ``names`` of ``folder``; their plain names do not stay behind for other tests."""
    path, before = list(sys.path), {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(folder))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path[:] = path
    for name, module in before.items():
        del sys.modules[name]
        if module is not None:
            sys.modules[name] = module


def mini_converter(name: str) -> ModuleType:
    """A converter of the mini recipe."""
    with local_modules(Path(__file__).resolve().parents[2] / "egs/mini/pam1/local", (name, "model_files")) as local:
        return getattr(local, name)


class SerialPool:
    """A pool that works in this process: starting others would import everything again."""

    def __enter__(self) -> SerialPool:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def imap(self, function: Callable[[Any], Any], items: Iterable[Any], chunksize: int = 1) -> Iterator[Any]:
        return map(function, items)


def in_this_process() -> SimpleNamespace:
    """A replacement of ``multiprocessing``."""
    return SimpleNamespace(get_context=lambda method: SimpleNamespace(Pool=lambda jobs: SerialPool()))
