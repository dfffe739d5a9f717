"""A packed experiment against its own decode directory."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

import pam_espnet
from pam_espnet.data.datadir import DataDir
from pam_espnet.decode.shards import read_wave


def check_archive(archive: Path, decoded: Path, data: Path, models: Mapping[str, Path], limit: int = 2) -> None:
    """Check that ``archive`` answers the first utterances of ``data`` as ``decoded``, its decode directory, does.

    Relative paths, in ``data`` and of models that are not named, start at the working directory.
    """
    tables = DataDir.load(data)
    lines = (decoded / "nbest.jsonl").read_text(encoding="utf-8").splitlines()[:limit]
    assert lines
    model = pam_espnet.load(archive, models=models)
    for entry in map(json.loads, lines):
        wave = read_wave(tables, entry["utt"], model.model.frontend.sample_rate)
        (answer,) = model.answer([wave], [entry["prompt"]], [entry["task"]])
        assert answer.texts == [hypothesis["text"] for hypothesis in entry["hypotheses"]]
        assert answer.scores == pytest.approx([one["score"] for one in entry["hypotheses"]], abs=1e-3)
