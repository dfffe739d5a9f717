"""The benchmark of ESPnet's frontends trains, decodes, scores and writes what it measured; nothing is done twice."""

from pathlib import Path

import pytest
from benchmarks import espnet_frontends
from tiny_model import tiny_config, write_data

from pam_espnet.config import write_config
from pam_espnet.errors import PamError
from pam_espnet.fileio import read_json


def test_every_frontend_is_measured(tiny_llm_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tiny_config(tiny_llm_dir), tmp_path / "train.yaml")
    words = ["--config", str(tmp_path / "train.yaml"), "--output", str(tmp_path / "out"), "--steps", "4"]
    words += ["--epoch_steps", "2", "--batch_size", "2"]
    for seed, name in enumerate(("train", "valid", "test")):
        words += [f"--{name}", str(write_data(tmp_path, name, size=3, seed=seed))]
    espnet_frontends.main(words)
    rows = read_json(tmp_path / "out/results.json")["rows"]
    assert [row["frontend"] for row in rows] == ["log-mel", "one", "two", "static", "pam"]
    assert all(row["words"] == [2, 2, 2] for row in rows)  # "you have", the recognition utterances alone
    assert all(row["wer"] == pytest.approx(100 * sum(row["errors"]) / 6) for row in rows)
    shown = [line for line in capsys.readouterr().out.splitlines() if "WER" in line]
    assert len(shown) == 5
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.pth")}
    espnet_frontends.main([*words, "--frontends", "static"])
    assert read_json(tmp_path / "out/results.json")["rows"] == [row for row in rows if row["frontend"] == "static"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.pth")} == files
    with pytest.raises(PamError, match="give another --output"):
        espnet_frontends.main([*words, "--batch_size", "3"])


def test_an_unknown_frontend(tiny_llm_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tiny_config(tiny_llm_dir), tmp_path / "train.yaml")
    needed = ["--train", "a", "--valid", "b", "--test", "c", "--output", str(tmp_path)]
    with pytest.raises(SystemExit):
        espnet_frontends.main(["--config", str(tmp_path / "train.yaml"), *needed, "--frontends", "mel"])
    assert "mel not among log-mel, one, two, static, pam" in capsys.readouterr().err
