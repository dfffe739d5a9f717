"""The measured costs of a step, by a clock that the test advances, and their way into the report."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import deeper_llm, tiny_config, write_data

from pam_espnet.bin.pam_exit_report import main as report
from pam_espnet.config import write_config
from pam_espnet.early_exit import cost_report, step_times
from pam_espnet.early_exit.measured_cost import MeasuredCost, Steps, exit_blocks
from pam_espnet.early_exit.step_times import measure
from pam_espnet.engine.calibration import Calibration
from pam_espnet.engine.engine import make_engine
from pam_espnet.engine.llama import Block, LlamaEngine
from pam_espnet.engine.ops import Ops
from pam_espnet.engine.static import StaticEngine
from pam_espnet.engine.static_memory import Memory
from pam_espnet.engine.tree import Tree
from pam_espnet.errors import ConfigError
from pam_espnet.fileio import read_json, save_trained
from pam_espnet.llm.llm import LLM
from pam_espnet.model import build_model
from pam_espnet.search.hypothesis import BeamOptions

BLOCKS = 6
COST = MeasuredCost(BLOCKS, block=2.0, fill=0.25, output=3.0, gate=0.5, head=3.0, constant=1.0)


@pytest.fixture(scope="module")
def llm_dir(tiny_llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    return deeper_llm(tiny_llm_dir, tmp_path_factory.mktemp("models") / "six", BLOCKS)


@pytest.fixture(params=["off", "on"])
def engine(request: pytest.FixtureRequest, llm_dir: Path) -> LlamaEngine:
    found = make_engine(LLM.from_pretrained(str(llm_dir), dtype="float32").eval(), graphs=request.param)
    assert isinstance(found, LlamaEngine)
    return found


class Clock:
    """Seconds that advance only where ``COST`` says that something costs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        prices = {  # of the eager engine, of the static one, of both
            (Block, "finish"): COST.block,
            (Block, "skip"): COST.fill,
            (LlamaEngine, "logits"): COST.output,
            (Tree, "append"): COST.constant,
            (Ops, "gate"): COST.block,
            (Ops, "logits"): COST.output,
            (Memory, "append"): COST.constant,
            (Calibration, "probability"): COST.gate,
        }
        for (owner, name), price in prices.items():
            monkeypatch.setattr(owner, name, self.charged(getattr(owner, name), lambda *_, price=price: price))
        filled = self.charged(StaticEngine.fill, lambda engine, *args: COST.fill * (len(engine.blocks) - args[-1]))
        monkeypatch.setattr(StaticEngine, "fill", filled)

    def charged(self, function: Callable[..., Any], price: Callable[..., float]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.seconds += price(*args) / 1000
            return function(*args, **kwargs)

        return run

    def __call__(self) -> float:
        return self.seconds


def expected(engine: LlamaEngine) -> MeasuredCost:
    """A gate of the static engine is an output layer of one row."""
    return replace(COST, gate=COST.gate + COST.output) if engine.graphs else COST


def prefix() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(2, 7, 32), torch.tensor([7, 5])


def test_least_squares_recover_the_costs() -> None:
    ways = [(6.0, 0.0, 0.0), (3.0, 0.0, 0.0), (4.0, 0.0, 0.0), (6.0, 5.0, 0.0), (5.5, 0.0, 2.5)]
    steps = [Steps("a way", COST.step(*one), *one) for one in ways]
    assert vars(MeasuredCost.fit(steps, BLOCKS, COST.output, COST.fill)) == pytest.approx(vars(COST))
    assert COST.step(BLOCKS) == 16.0 and COST.step(4.0, gates=2.0) == 13.5
    assert COST.speedup(4.0, heads=1.0) == pytest.approx(16 / 15.5)


def test_noise_makes_no_cost_negative() -> None:
    full, half = COST.step(6), COST.step(3)
    steps = [Steps("never", full, 6), Steps("fixed:3", half - 4, 3)]  # a line through less than zero
    steps += [Steps("gate", full - 3, 6, gates=5), Steps("confidence", full - 3, 6, heads=3)]
    found = MeasuredCost.fit(steps, BLOCKS, COST.output, COST.fill)
    assert found.constant == found.gate == found.head == 0.0
    assert found.step(6) == pytest.approx(full, rel=0.2)


def test_what_fill_and_output_layer_are_thought_to_cost_does_not_change_a_prediction() -> None:
    steps = [Steps("a way", COST.step(*one), *one) for one in [(6.0, 0, 0), (3.0, 0, 0), (6.0, 5.0, 0), (6.0, 0, 3.0)]]
    wrong = MeasuredCost.fit(steps, BLOCKS, output=1.0, fill=0.5)
    assert wrong.block != pytest.approx(COST.block)
    assert wrong.speedup(2.5, heads=1.0) == pytest.approx(COST.speedup(2.5, heads=1.0))


@pytest.mark.parametrize("beam_size", [1, 3])
def test_costs_of_an_engine_are_found(engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch, beam_size: int) -> None:
    monkeypatch.setattr(step_times, "ROUNDS", 2)
    monkeypatch.setattr(step_times, "MOST", 5)
    clock = Clock(monkeypatch)
    cost, steps, counts = measure(engine, *prefix(), BeamOptions(beam_size=beam_size), 1000.0, clock)
    assert vars(cost) == pytest.approx(vars(expected(engine)))
    assert counts == {"rounds": 2, "tokens": 5}
    depths = {one.way: one.depth for one in steps}
    assert depths == {"never": 6, "fixed:3": 3, "fixed:4": 4, "fixed:5": 5, "gate": 6, "confidence": 6}
    checks = {one.way: (one.gates, one.heads) for one in steps}
    assert checks["gate"] == (3, 0) and checks["confidence"] == (0, 3) and checks["fixed:3"] == (0, 0)
    assert engine.exits is None  # the engine itself still never exits


def test_time_limit(engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    options = BeamOptions(beam_size=2)
    clock = Clock(monkeypatch)
    cost, _, counts = measure(engine, *prefix(), options, 2.0, clock)  # a round of 24 tokens takes more than that
    assert vars(cost) == pytest.approx(vars(expected(engine)))
    assert clock.seconds < 2.5 and counts["rounds"] >= 1 and counts["tokens"] < 24
    before = clock.seconds
    with pytest.raises(ConfigError, match=r"--measure_cost 0.1: too short"):
        measure(engine, *prefix(), options, 0.1, clock)
    assert clock.seconds - before < 0.2


def test_blocks_at_which_steps_exit() -> None:
    assert exit_blocks(30) == [15, 20, 25] and exit_blocks(36) == [18, 24, 30]
    assert exit_blocks(2) == [1]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "ROUNDS", 1)
    monkeypatch.setattr(step_times, "MOST", 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), "test", size=2)


def experiment(path: Path, llm: Path, **llm_conf: Any) -> Path:
    """An experiment that was never trained."""
    torch.manual_seed(0)
    config = tiny_config(llm)
    config["llm_conf"].update(llm_conf)
    save_trained(build_model(config).state_dict(), path / "model.safetensors")
    write_config(config, path / "config.yaml")
    return path


@pytest.mark.usefixtures("quick")
def test_the_report_has_the_costs_and_measures_once(
    llm_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exp, out = experiment(tmp_path / "exp", llm_dir), tmp_path / "report"
    args = [str(exp), "--data", str(data), "--answers", "reference", "--out", str(out), "--layers", "2", "5"]
    assert report([*args, "--measure_cost", "0"]) == 0
    assert read_json(out / "exit_report.json")["measured_cost"] is None
    assert "Cost of a step" not in (out / "EXIT.md").read_text()

    assert report(args) == 0
    record = read_json(out / "exit_report.json")
    measured = record["measured_cost"]
    assert measured["tokens"] == 4 and measured["beam_size"] == 4 and measured["key"]["batch_size"] == 8
    assert measured["cost"]["blocks"] == BLOCKS and measured["cost"]["output"] > 0 and measured["cost"]["fill"] > 0
    rows = {(one["set"], one["exit"]): one for one in record["predictions"]}
    assert {exits for name, exits in rows if not name} == {"fixed:2", "fixed:3", "fixed:4", "fixed:5"}
    cost = MeasuredCost(**measured["cost"])
    oracle = rows["test: asr", "oracle, candidate blocks, saturated"]
    figures = record["sets"]["test"]["asr"]
    assert oracle["by_weights"] == figures["oracle"]["step"]["candidate blocks"]["saturated"]["speedup"]
    assert oracle["by_measurement"] == cost.speedup(oracle["mean_depth"])
    patience = rows["test: asr", "patience 2"]
    assert patience["checks"] == 2 == figures["gates"]["patience 2"][0]["checks"]
    assert patience["by_measurement"] == cost.speedup(patience["mean_depth"], heads=2)
    text = (out / "EXIT.md").read_text()
    for line in ("| all 6 blocks |", "| one check by a linear gate |", "| a step, fixed:3, as timed |"):
        assert line in text
    assert "**Predicted, not measured**" in text and "| test: asr | patience 2 |" in text

    def refuse(*_args: Any) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr(cost_report, "measure", refuse)
    for more in ([], ["--measure_cost", "0"]):
        assert report([*args, *more]) == 0
        assert read_json(out / "exit_report.json")["measured_cost"] == measured
    with pytest.raises(AssertionError, match="measured twice"):
        report([*args, "--batch_size", "2"])  # another setting


@pytest.mark.usefixtures("quick")
def test_a_report_says_why_there_are_no_costs(
    llm_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exp = experiment(tmp_path / "exp", llm_dir, fused_decoding=False)
    args = [str(exp), "--data", str(data), "--answers", "reference"]
    assert report(args) == 0
    text = (exp / "exit_report" / "EXIT.md").read_text()
    assert "Not measured: transformers must run LlamaForCausalLM" in text

    exp = experiment(tmp_path / "slow", llm_dir)
    args = [str(exp), "--data", str(data), "--answers", "reference"]
    assert report([*args, "--measure_cost", "1e-3"]) == 0
    assert "Not measured: --measure_cost 0.001: too short" in (exp / "exit_report" / "EXIT.md").read_text()
    assert report(args) == 0  # a longer limit: measured now
    assert "reason" not in read_json(exp / "exit_report" / "cost.json")
