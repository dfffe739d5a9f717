"""An experiment directory belongs to one configuration and one set of data.

Stages skip what is done; a directory that went on under another learning rate or other recordings would hold a model
that its own configuration does not describe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pam_espnet.data.datadir import DataDir
from pam_espnet.data.passport import Passport
from pam_espnet.data.prompts import read_wordings
from pam_espnet.fileio import check_key, sha256_file

# What may change without changing the model.
_FREE = ("resources", "num_workers", "log_interval", "checkpoint_steps")


def begin_experiment(exp_dir: str | Path, config: Mapping[str, Any], data_dirs: Sequence[str | Path]) -> None:
    """Note in ``<exp_dir>/key.json`` what the experiment depends on, or compare it with what is noted.

    Args:
        exp_dir: experiment directory.
        config: its merged configuration; the files of ``prompt_files`` count by what is in them.
        data_dirs: formatted data directories it trains on; their audio, texts, prompts and tasks count.

    Raises:
        DataError: the directory was begun with another configuration or other data; names what differs. Also a prompt
            file that cannot be used.
    """
    data = {}
    for path in data_dirs:
        tables = DataDir.load(path)
        data[Path(path).name] = {
            "audio_sha256": Passport.load(path).audio_digest(tables.utterances),
            "tables_sha256": tables.digest(),
        }
    key = {"config": {name: value for name, value in config.items() if name not in _FREE}, "data": data}
    if files := config.get("prompt_files"):
        read_wordings(files)  # says what is wrong with them, before anything is made
        key["prompt_files_sha256"] = {task: sha256_file(path) for task, path in files.items()}
    hint = f"give another --tag, or remove {exp_dir} to train it anew"
    check_key(Path(exp_dir) / "key.json", key, hint)
