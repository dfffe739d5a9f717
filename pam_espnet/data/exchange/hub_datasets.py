"""Hugging Face datasets, of the hub or of local parquet and arrow files: streamed, with audio as the bytes of files."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pam_espnet.data.exchange.json_files import CONVERSATIONS, ENTRIES, read_messages
from pam_espnet.data.exchange.rows import NO_AUDIO, USUAL, Row, Source, file_stamp
from pam_espnet.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow
    from datasets import IterableDataset
    from datasets.packaged_modules.parquet.parquet import Parquet

STATE_EVERY = 50  # rows; a killed import reads at most this number again
BATCH = 4  # rows of parquet that are decoded together
LOCAL = (".parquet", ".arrow")
CLIENTS = ("httpx", "httpx2")  # HTTP clients of huggingface_hub, by its version
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(text: str) -> bool:
    """Whether ``text`` looks like ``owner/name``."""
    return _HUB_ID.fullmatch(text) is not None


def open_dataset(
    name: str, *, split: str | None = None, config: str | None = None, revision: str | None = None
) -> Source:
    """One split of a dataset; None: the only one. Other arguments and errors as of ``open_splits``.
    Raises DataError: no such split, or several and none is named."""
    splits = open_splits(name, config=config, revision=revision)
    chosen = split or (next(iter(splits)) if len(splits) == 1 else "")
    if chosen not in splits:
        wrong = f"has no split {split!r}" if split else "has several splits"
        raise DataError(name, f"{wrong}; there are {', '.join(splits)}", hint="name one: --split NAME")
    return splits[chosen]


def open_splits(name: str, *, config: str | None = None, revision: str | None = None) -> dict[str, Source]:
    """The splits of a dataset of the hub, of a local parquet file, or of a folder of them or of ``save_to_disk``.

    Args:
        name: id on the hub, or path.
        config: which of its configurations; None where there is only one.
        revision: commit, branch or tag on the hub; what is read is its commit at this moment.

    Raises:
        ConfigError: ``datasets`` is not installed.
        DataError: no such dataset, several configurations and none named, no connection.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("datasets is not installed\n  -> tools/setup.sh --extras import") from error
    datasets.disable_progress_bars()
    path = Path(name)
    stamp: dict[str, Any]
    try:
        if path.exists():
            files = [path] if path.is_file() else sorted(file for kind in LOCAL for file in path.rglob(f"*{kind}"))
            stamp = dict(file_stamp(files))
            if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
                loaded = datasets.load_from_disk(str(path))
            elif path.is_file():
                loaded = _stream(path.suffix[1:], data_files=[str(path)])
            else:
                loaded = _stream(str(path), config)
        else:
            from huggingface_hub import HfApi

            info = HfApi().dataset_info(name, revision=revision)
            stamp = {"commit": info.sha, "licence": info.card_data.get("license") if info.card_data else None}
            loaded = _stream(name, config, revision=info.sha)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, *_client_errors()) as error:
        message = f"cannot be opened: {_first_line(error)}"
        hint = "--config and --split name its parts; private ones need `hf auth login`; see HF_HUB_OFFLINE, HF_ENDPOINT"
        raise DataError(name, message, hint=hint) from error
    parts = loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    root = path if path.is_dir() else path.parent
    return {split: _open_split(name, split, part, root, {**stamp, "config": config}) for split, part in parts.items()}


def _open_split(name: str, split: str, part: Any, root: Path, stamp: Mapping[str, Any]) -> Source:
    """``part``: a Dataset or an IterableDataset."""
    found = (part.info.splits or {}).get(split)
    stream = part if hasattr(part, "state_dict") else part.to_iterable_dataset()
    stream = stream.decode(False) if stream.features else stream
    names = ENTRIES if CONVERSATIONS & set(stream.column_names or next(iter(stream), ())) else USUAL

    def read(state: Any, skip: int) -> Iterator[Row]:
        rows = _read_rows(name, stream, state, skip)
        return map(read_messages, rows) if names is ENTRIES else rows

    return Source(name, root, {**stamp, "split": split}, read, names, found.num_examples if found else None)


def _stream(name: str, config: str | None = None, **options: Any) -> Mapping[str, IterableDataset]:
    """As ``load_dataset(streaming=True)``; parquet is read by ``_read_parquet``."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    builder = datasets.load_dataset_builder(name, config, **options)
    if isinstance(builder, Parquet):
        builder._generate_tables = partial(_read_parquet, builder)
    builder.config.decode_num_threads = 0  # nothing is decoded
    splits = builder.as_streaming_dataset()
    if not isinstance(builder, datasets.ArrowBasedBuilder):
        for split in splits.values():  # folders and tar files: rows as they are; by their types they need torchcodec
            split.info.features = None
    return splits


def _read_parquet(builder: Parquet, files: Iterable[str], **_: Any) -> Iterator[tuple[Any, pyarrow.Table]]:
    """In place of ``builder._generate_tables``: one row group after another, because pyarrow keeps all that it has read
    for one iterator until that ends; in this thread, because others may still be reading when the program ends after a
    lost connection, which aborts it."""
    import pyarrow.parquet
    from datasets.utils.file_utils import xopen

    for number, name in enumerate(files):
        with xopen(name, "rb") as file, pyarrow.parquet.ParquetFile(file) as source:
            for group in range(source.num_row_groups):
                for index, batch in enumerate(source.iter_batches(BATCH, row_groups=[group], use_threads=False)):
                    yield (number, group, index), builder._cast_table(pyarrow.Table.from_batches([batch]))


def _read_rows(name: str, stream: IterableDataset, state: Any, skip: int) -> Iterator[Row]:
    """Rows behind ``state``, {"rows": number of rows before it, "stream": the stream's own}, or from the beginning."""
    import datasets
    import pyarrow

    first = 0
    if state is not None:
        stream.load_state_dict(state["stream"])
        first = state["rows"]
    features = stream.features or {}
    labels = {column: kind for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    try:
        for number, values in enumerate(islice(stream, skip, None), first + skip + 1):
            for column, kind in labels.items():
                if isinstance(values[column], int) and values[column] >= 0:
                    values[column] = kind.int2str(values[column])
            mark = {"rows": number, "stream": stream.state_dict()} if number % STATE_EVERY == 0 else None
            yield Row(f"row {number}", values, _fetch_files(name, values), state=mark)
    except (OSError, datasets.exceptions.DatasetsError, pyarrow.ArrowInvalid, *_client_errors()) as error:
        hint = "run the same command again: it continues where it stopped"
        raise DataError(name, f"cannot be read any further: {_first_line(error)}", hint=hint) from error


def _fetch_files(name: str, values: dict[str, Any]) -> str:
    """Read the files that a row references in its own repository; why that could not be done, or ""."""
    import fsspec

    own = rf"((zip|tar|gzip)://[^:]*::)?hf://datasets/{re.escape(name)}@"
    for column, value in values.items():
        path = value.get("path") if isinstance(value, dict) and not value.get("bytes") else value
        if not isinstance(path, str) or not re.match(own, path):
            continue
        values[column] = found = {"path": path.rpartition("/")[2], "bytes": b""}
        try:
            with fsspec.open(path, "rb") as file:
                found["bytes"] = file.read()
        except FileNotFoundError:
            return f"{NO_AUDIO}{path} is not on the hub"
    return ""


def _client_errors() -> list[type[Exception]]:
    """A refused or lost connection, which huggingface_hub passes on as it is."""
    return [sys.modules[client].HTTPError for client in CLIENTS if client in sys.modules]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
