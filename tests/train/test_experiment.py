"""An experiment directory belongs to one configuration and one set of data."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import write_data

from pam_espnet.data.tables import read_table, write_table
from pam_espnet.errors import DataError
from pam_espnet.train.experiment import begin_experiment


def test_the_same_again_is_fine_and_anything_else_is_named(tmp_path: Path) -> None:
    data = write_data(tmp_path, "train", size=1)
    config = {"optim_conf": {"lr": 0.1}, "max_epoch": 3, "resources": {"disk_gb": 1}}
    begin_experiment(tmp_path / "exp", config, [data])
    begin_experiment(tmp_path / "exp", {**config, "resources": {"disk_gb": 9}}, [data])
    with pytest.raises(DataError, match=r"optim_conf\.lr.*\n.*--tag"):
        begin_experiment(tmp_path / "exp", {**config, "optim_conf": {"lr": 0.2}}, [data])
    with pytest.raises(DataError, match="max_epoch"):
        begin_experiment(tmp_path / "exp", {"optim_conf": {"lr": 0.1}}, [data])
    wordings = tmp_path / "asr.txt"
    asked = {**config, "prompt_files": {"asr": str(wordings)}}
    with pytest.raises(DataError, match="no such prompt file"):
        begin_experiment(tmp_path / "asked", asked, [data])
    wordings.write_text("Transcribe the speech.\n")
    begin_experiment(tmp_path / "asked", asked, [data])
    wordings.write_text("Write the words down.\n")
    with pytest.raises(DataError, match=r"prompt_files_sha256\.asr"):
        begin_experiment(tmp_path / "asked", asked, [data])
    text = read_table(data / "text")
    write_table(data / "text", {**text, next(iter(text)): "something else"})
    with pytest.raises(DataError, match=r"data\.train\.tables"):
        begin_experiment(tmp_path / "exp", config, [data])
