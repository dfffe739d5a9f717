"""From an experiment and development data to a gate that the search can use."""

from pathlib import Path

import pytest
import torch
from tiny_model import tiny_config, write_data

from pam_espnet.bin.pam_calibrate_exit import main as calibrate
from pam_espnet.bin.pam_decode import main as decode
from pam_espnet.config import write_config
from pam_espnet.decode.options import AnswerOptions
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.early_exit.fitting import CostModel, Judgement, observe
from pam_espnet.engine.calibration import Calibration
from pam_espnet.errors import ConfigError
from pam_espnet.fileio import read_json, save_trained
from pam_espnet.model import build_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), "dev", size=40)


@pytest.fixture
def exp(tiny_llm_dir: Path, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = tiny_config(tiny_llm_dir)
    save_trained(build_model(config).state_dict(), tmp_path / "model.safetensors")
    write_config(config, tmp_path / "config.yaml")
    return tmp_path


def test_states_are_those_that_name_the_answers(exp: Path, data: Path, tiny_llm_dir: Path) -> None:
    torch.manual_seed(0)
    speech = SpeechLLM(build_model(tiny_config(tiny_llm_dir)), AnswerOptions())
    observed = observe(speech, data, [1], batch_size=7)
    assert observed.hidden[0].shape == observed.last.shape == (len(observed.utterance), 32)
    assert observed.utterance.unique().numel() == 120
    again = observe(speech, data, [1, 2], batch_size=120)  # block 2 is the last one
    assert torch.allclose(observed.last, again.hidden[1], atol=1e-4)
    assert torch.allclose(observed.hidden[0], again.hidden[0], atol=1e-4)


@pytest.mark.parametrize("more", [[], ["--no_maps"]])
def test_calibrate_and_decode(exp: Path, data: Path, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(["--exp", str(exp), "--data", str(data), "--layers", "1", "--precision", "0.6", *more]) == 0
    shown, record = capsys.readouterr().out, read_json(exp / "exit.json")
    assert f"early exit: {record['advice']}" in shown
    assert (record["judgement"]["speedup"] >= 1.05) == (record["advice"] == "on")
    assert record["maps"] == (more != ["--no_maps"]) and record["layers"] == [1]
    gate = {"mode": "gate", "calibration": str(exp / "exit.safetensors"), "threshold": 0.0}
    write_config({"beam_size": 2, "max_new_tokens": 6, "exit": gate}, exp / "decode.yaml")
    args = ["--exp", str(exp), "--data", str(data), "--out", str(exp / "out"), "--config", str(exp / "decode.yaml")]
    assert decode([*args, "--limit", "4"]) == 0
    lines = (exp / "out" / "nbest.jsonl").read_text()
    assert '"depths": [2, 1' in lines  # at threshold zero every token after the first exits at block 1


def test_no_advice_to_exit_where_the_search_cannot(
    exp: Path, data: Path, tiny_llm_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Judgement, "worth_it", True)
    args = ["--exp", str(exp), "--data", str(data), "--layers", "1"]
    for fused, advice in ((True, "on"), (False, "off")):
        config = tiny_config(tiny_llm_dir)
        config["llm_conf"] = {**config.get("llm_conf", {}), "fused_decoding": fused}
        write_config(config, exp / "config.yaml")
        assert calibrate(args) == 0
        shown, record = capsys.readouterr().out, read_json(exp / "exit.json")
        assert f"early exit: {advice}" in shown and ("the search cannot exit" in shown) != fused
        assert record["advice"] == advice and record["can_exit"] is fused


def test_other_data_are_fitted_to(exp: Path, data: Path, tmp_path: Path) -> None:
    """All of --data judges then, and what is fitted does not depend on it."""
    train = write_data(tmp_path / "train", "train", size=150)
    common = ["--exp", str(exp), "--layers", "1", "--fit", str(train), "--fit_utterances", "60"]
    gates = []
    for judged in (data, write_data(tmp_path / "other", "dev", size=110)):
        assert calibrate([*common, "--data", str(judged)]) == 0
        record = read_json(exp / "exit.json")
        speech = SpeechLLM.load(exp, AnswerOptions())
        counts = [len(observe(speech, one, [1], most=most).last) for one, most in ((train, 60), (judged, None))]
        assert record["tokens"] == {"fitted": counts[0], "judged": counts[1]} and record["fit"] == str(train)
        gates.append(Calibration.load(exp / "exit.safetensors", 32).gates)
    assert torch.equal(*gates)
    assert 30 < observe(speech, train, [1], most=60).utterance.unique().numel() <= 60


def test_the_cost_model_knows_the_llm(tiny_llm_dir: Path) -> None:
    model = build_model(tiny_config(tiny_llm_dir))
    cost = CostModel.of(model.decoder)
    block = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32  # q, o; k, v; the feed-forward network; norms
    assert cost.blocks == 2
    assert cost.head == pytest.approx(300 * 32 / block) and cost.memory == pytest.approx(2 * 32 * 16 / block)


@pytest.mark.parametrize(
    ("more", "message"), [(["--layers", "2"], "--layers"), (["--precision", "0"], "--precision"), ([], "too few")]
)
def test_errors(exp: Path, tmp_path: Path, more: list[str], message: str) -> None:
    few = write_data(tmp_path / "few", "dev", size=3)
    with pytest.raises(ConfigError, match=message):
        calibrate(["--exp", str(exp), "--data", str(few), *more])
