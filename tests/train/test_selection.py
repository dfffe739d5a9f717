"""The epoch that is kept: normalised scores, what is written, what a second call does, and the way back to the loss."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import tiny_config, write_data

from pam_espnet.bin.pam_select import main
from pam_espnet.config import write_config
from pam_espnet.decode.shards import DecodeOptions
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.errors import CheckpointError, DataError
from pam_espnet.fileio import read_json, read_trained
from pam_espnet.model import build_model
from pam_espnet.train import selection
from pam_espnet.train.selection import best, kept_epochs, normalise, select_by_scores, summarise

SEARCH = {"beam_size": 1, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), "dev", size=2)


@pytest.fixture
def exp(tiny_llm_dir: Path, tmp_path: Path) -> Path:
    """Files of a finished training: two epochs, the average, a curve; epoch 10 is not epoch 1."""
    path = tmp_path / "exp"
    path.mkdir()
    config = tiny_config(tiny_llm_dir)
    for epoch in (2, 10):
        torch.manual_seed(epoch)
        torch.save(build_model(config).state_dict(), path / f"{epoch}epoch.pth")
    (path / "valid.loss_answer.ave.pth").symlink_to("10epoch.pth")
    write_config({**config, "best_model_criterion": [["valid", "loss_answer", "min"]]}, path / "config.yaml")
    write_config(SEARCH, path / "decode.yaml")
    lines = [{"epoch": epoch, "split": "valid", "step": epoch, "loss_answer": 1.0 / epoch} for epoch in (2, 10)]
    (path / "curve.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_normalised_scores() -> None:
    assert [normalise("asr", value) for value in (0.0, 25.0, 100.0, 480.0)] == [1.0, 0.75, 0.0, 0.0]
    assert normalise("count", 80.0) == normalise("verify", 80.0) == 0.8
    assert normalise("caption", 0.6) == 0.6 and normalise("caption", 1.3) == 1.3


def test_every_task_counts_the_same_and_the_loss_decides_between_equals() -> None:
    def scores(wer: float | None, accuracy: float) -> dict[str, Any]:
        tasks = {"asr": {"wer": {"value": wer, "n": 900}}, "count": {"accuracy": {"value": accuracy, "n": 2}}}
        return {"data_dir": "dev", "tasks": tasks}

    given = enumerate(((50, 60), (40, 70), (30, 60)), 1)
    epochs = [{"epoch": n, "loss_answer": None, **summarise(scores(*pair))} for n, pair in given]
    assert [round(entry["mean"], 6) for entry in epochs] == [0.55, 0.65, 0.65]
    assert best(epochs)["epoch"] == 2
    epochs[2]["loss_answer"] = 0.5
    assert best(epochs)["epoch"] == 3
    with pytest.raises(DataError, match="WER of task asr is undefined"):
        summarise(scores(None, 60))


def test_the_best_epoch_becomes_the_model(
    exp: Path, dev: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--exp", str(exp), "--data", str(dev), "--config", str(exp / "decode.yaml")]
    worth = {2: 0.4, 10: 0.3}
    real = selection.summarise
    monkeypatch.setattr(  # answers of random models are worth nothing: their means are given, the rest is real
        selection, "summarise", lambda scores: {**real(scores), "mean": next(means)}
    )
    means = iter([worth[2], worth[10]])
    assert main(command) == 0
    assert "| **2** | 0.5000 |" in capsys.readouterr().out
    assert same(exp / "model.safetensors", exp / "2epoch.pth")
    record = read_json(exp / "selection.json")
    assert record["selected"] == 2 and [entry["epoch"] for entry in record["epochs"]] == [2, 10]
    assert (
        set(record["epochs"][0]["tasks"]) == {"asr", "count", "caption"} and record["epochs"][1]["loss_answer"] == 0.1
    )
    assert (exp / "select/10epoch/dev/scores.json").is_file()

    # again: nothing is decoded, and what was decoded with the model still belongs to it
    before = (exp / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(SpeechLLM, "load", None)
        means = iter([worth[2], worth[10]])
        assert main(command) == 0
    assert (exp / "model.safetensors").read_bytes() == before

    # other scores change the model
    means = iter([0.1, 0.2])
    assert main(command) == 0
    assert same(exp / "model.safetensors", exp / "10epoch.pth") and read_json(exp / "selection.json")["selected"] == 10

    assert main(["--exp", str(exp), "--by", "loss"]) == 0
    assert not (exp / "selection.json").exists() and not (exp / "SELECTION.md").exists()
    assert same(exp / "model.safetensors", exp / "10epoch.pth")


def test_a_killed_selection_continues(exp: Path, dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, loaded = SpeechLLM.load, []

    def load(folder: Path, *rest: Any) -> SpeechLLM:
        loaded.append(folder.name)
        if loaded == ["2epoch", "10epoch"]:
            raise KeyboardInterrupt
        return real(folder, *rest)

    monkeypatch.setattr(SpeechLLM, "load", load)
    with pytest.raises(KeyboardInterrupt):
        select_by_scores(exp, dev, SEARCH, DecodeOptions(), {})
    assert not (exp / "model.safetensors").exists() and not (exp / "selection.json").exists()
    record = select_by_scores(exp, dev, SEARCH, DecodeOptions(), {})
    assert loaded == ["2epoch", "10epoch", "10epoch"] and len(record["epochs"]) == 2


def test_mistakes(exp: Path, dev: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no <n>epoch\.pth here\n.*--stage 3"):
        kept_epochs(tmp_path)
    with pytest.raises(SystemExit):
        main(["--exp", str(exp)])


def same(model: Path, checkpoint: Path) -> bool:
    one, other = read_trained(model), torch.load(checkpoint, weights_only=True)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
