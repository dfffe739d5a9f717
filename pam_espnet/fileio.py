"""Files and folders that are whole or absent: written under a temporary name beside the target, then renamed. Text,
JSON, keys of folders, and trained tensors, which are loaded strictly."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pam_espnet.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from torch import Tensor, nn

DISK_ERRORS = (errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.EROFS)  # a disk or folder refuses a file
MODEL_FILE = "model.safetensors"


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` when the block ends without an error.

    After a kill there is the old ``path`` (or none) and at most one ``.<name>.tmp-<pid><suffix>`` file. The
    temporary name keeps the suffix, because some writers choose the format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.stem}.tmp-{os.getpid()}{path.suffix}")
    try:
        yield tmp
        os.replace(tmp, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk's error has none
        raise
    finally:
        tmp.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside ``folder``; rename it to ``folder`` when the block ends without an error.

    An older ``folder`` is replaced at the end. What a killed process left half written is removed by the next call, so
    two processes must not make the same folder at once (see ``exclusive``).
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.tmp-"
    for stale in [path for path in folder.parent.iterdir() if path.name.startswith(prefix)]:
        shutil.rmtree(stale)
    tmp, old = (folder.with_name(f"{prefix}{os.getpid()}-{word}") for word in ("new", "old"))
    tmp.mkdir()
    try:
        yield tmp
        if folder.exists():
            os.replace(folder, old)
        os.replace(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def exclusive(path: str | Path) -> Iterator[None]:
    """Hold the lock file ``path`` while the block runs; wait, with a warning, while another process holds it.

    A process of a killed run may still be active, and two that write the same directory would spoil it. The lock ends
    with the process, however it ends.
    """
    import fcntl

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.warning(f"{path} is held by another process, maybe of a run that was killed: waiting for it to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_text(path: str | Path) -> str:
    """Text of a UTF-8 file, without the byte order mark that some editors write.
    Raises DataError: not UTF-8; names the line."""
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        hint = f"save it as UTF-8, for example: iconv -f latin1 -t utf-8 {path} > new"
        raise DataError(path, f"is not UTF-8 (byte {content[error.start]:#04x})", line=line, hint=hint) from error


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, atomically."""
    with atomic_path(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path``, atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def sha256_file(*paths: str | Path) -> str:
    """SHA-256 of a file's bytes, or of several one after the other, as 64 hex digits."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)  # takes up the one that is there
    return digest.hexdigest()


def check_key(path: str | Path, key: Mapping[str, Any], hint: str) -> None:
    """Write what a folder's contents depend on, as JSON, to ``path``, or compare it with what is written there.
    Raises DataError: another key is there; names the entries that differ; ``hint`` is what to type then."""
    if Path(path).exists():
        compare_keys(path, read_json(path), key, hint)
    else:
        write_json(path, dict(key))


def compare_keys(path: str | Path, found: Mapping[str, Any], wanted: Mapping[str, Any], hint: str) -> None:
    """Raises DataError about ``path`` where the keys ``found`` and ``wanted`` differ; names the entries."""
    old, new = _flat(found), _flat(wanted)
    if changed := sorted(name for name in {*old, *new} if old.get(name) != new.get(name)):
        listed = ", ".join(changed[:8]) + (", ..." if len(changed) > 8 else "")
        raise DataError(path, f"was made with other settings or data (changed: {listed})", hint=hint)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``; lists count as one value."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {k: v for key, part in value.items() for k, v in _flat(part, f"{name}.{key}" if name else key).items()}


# ---- trained tensors, as safetensors --------------------------------------------------------------------------------


def save_trained(state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically; ``metadata`` is kept in the header."""
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}
    with atomic_path(path) as tmp:
        save_file(tensors, tmp, metadata={"format": "pt", **(metadata or {})})


def read_trained(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file; a missing or truncated one is a CheckpointError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint\n  -> train first: ./run.sh --stage 3 --stop_stage 3")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged ({error})\n  -> remove it and run stage 3 again") from error


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> str:
    """Load ``state`` into ``model``; every trained tensor must be there with its shape, and nothing else. One number
    where the model has a vector is for all its elements: the temperature that experts shared in earlier versions.

    Returns:
        a one-line report: how many tensors and parameters were loaded, per top-level part, and from where.

    Raises CheckpointError: naming missing, unexpected and wrongly shaped tensors (at most ten of each).
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state = {name: one.expand(own[name]) if not one.dim() and name in own else one for name, one in state.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    both = sorted(set(own) & set(shapes))
    wrong = [f"{name}: checkpoint {shapes[name]}, model {own[name]}" for name in both if shapes[name] != own[name]]
    problems = {
        "missing in the checkpoint": sorted(set(own) - set(shapes)),
        "not in the model": sorted(set(shapes) - set(own)),
        "of another shape": wrong,
    }
    lines = [
        f"  {len(names)} {what}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}\n"
        for what, names in problems.items()
        if names
    ]
    if lines:
        hint = "use the config.yaml beside the checkpoint, or train again"
        raise CheckpointError(f"{source}: does not fit this model\n{''.join(lines)}  -> {hint}")
    model.load_state_dict(dict(state))
    parts = Counter[str]()
    for name, tensor in state.items():
        parts[name.split(".")[0]] += tensor.numel()
    report = f"loaded {len(state)} tensors from {source}: " + ", ".join(f"{k} {v:,}" for k, v in parts.items())
    logging.info(report)
    return report
