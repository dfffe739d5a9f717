"""Which reader a source needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pam_espnet.data.exchange.csv_tables import open_csv, open_folder
from pam_espnet.data.exchange.hub_datasets import LOCAL, is_hub_id, open_dataset
from pam_espnet.data.exchange.json_files import open_json
from pam_espnet.data.exchange.rows import Source
from pam_espnet.errors import ConfigError, DataError

KINDS = (
    "a .jsonl, .json or .jsonl.gz manifest, a .csv or .tsv, a folder with one, .parquet files, or owner/name on the hub"
)


def open_source(name: str, parts: Mapping[str, str]) -> Source:
    """The source by its name; ``parts``: split, config and revision of a Hugging Face dataset (``open_dataset``).
    Raises DataError: there is no such source, or of no known kind; ConfigError: parts of something without parts."""
    path = Path(name)
    if path.is_dir() and any(next(path.rglob(f"*{kind}"), None) for kind in LOCAL):
        return open_dataset(name, **parts)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if path.is_file() and suffixes and suffixes[-1] in LOCAL:
        return open_dataset(name, **parts)
    if not path.exists() and is_hub_id(name) and not path.parent.exists():
        return open_dataset(name, **parts)
    if parts:
        raise ConfigError(f"--{next(iter(parts))}: {name} is no Hugging Face dataset, only they have it")
    if path.is_dir():
        table = path / "metadata.jsonl"  # with metadata.csv, the two that Hugging Face's audio folders may have
        return open_json(table) if table.is_file() else open_folder(path)
    if not path.is_file():
        raise DataError(name, "no such file or folder", hint=f"a source is {KINDS}")
    if suffixes and suffixes[-1] in (".csv", ".tsv"):
        return open_csv(path)
    if {".json", ".jsonl", ".ndjson"} & set(suffixes[-2:]):
        return open_json(path)
    raise DataError(name, "is of no known kind", hint=f"a source is {KINDS}")
