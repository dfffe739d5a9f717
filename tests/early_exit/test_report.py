"""The early-exit report: what blocks predict, the oracle, gates, and the sweep from a command line to its files."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import tiny_config, write_data

from pam_espnet.bin.pam_decode import main as decode
from pam_espnet.bin.pam_exit_report import main as report
from pam_espnet.config import write_config
from pam_espnet.data.datadir import DataDir
from pam_espnet.data.tables import read_table
from pam_espnet.decode import speech_llm
from pam_espnet.decode.options import AnswerOptions
from pam_espnet.decode.shards import DecodeOptions
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.early_exit.fitting import CostModel, Judgement, outcome
from pam_espnet.early_exit.profile import Profile, oracle, profile, summarise
from pam_espnet.early_exit.states import reference_answers
from pam_espnet.early_exit.sweep import parse_point, read_timing, sweep
from pam_espnet.engine.calibration import Calibration
from pam_espnet.errors import ConfigError, DataError
from pam_espnet.fileio import read_json, save_trained, write_json
from pam_espnet.model import build_model

BLOCKS, CHANGING = 4, 2  # blocks after the first two change nothing
BEAM = 3


@pytest.fixture(scope="module")
def llm_dir(tiny_llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLM with four blocks, the last two of them the identity."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(tiny_llm_dir)
    config.num_hidden_layers = BLOCKS
    config.initializer_range = 0.3
    torch.manual_seed(4)
    lm = AutoModelForCausalLM.from_config(config).float()
    for layer in lm.model.layers[CHANGING:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    path = tmp_path_factory.mktemp("models") / "four"
    lm.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_llm_dir).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), "test", size=4)


@pytest.fixture(scope="module")
def exp(llm_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoded experiment with a calibration of blocks 1 and 2."""
    path = tmp_path_factory.mktemp("run") / "exp"
    torch.manual_seed(0)
    config = tiny_config(llm_dir)
    save_trained(build_model(config).state_dict(), path / "model.safetensors")
    write_config(config, path / "config.yaml")
    write_config({"beam_size": BEAM, "max_new_tokens": 8}, path / "decode.yaml")
    calibration(path / "exit.safetensors")
    args = ["--exp", str(path), "--data", str(data), "--out", str(path / "decode_beam" / "test")]
    assert decode([*args, "--config", str(path / "decode.yaml"), "--dtype", "float32"]) == 0
    return path


def calibration(path: Path) -> Calibration:
    """Maps that change nothing and gates that give 0.6 and 0.8 for any state."""
    maps = torch.cat([torch.eye(32), torch.zeros(1, 32)]).expand(2, -1, -1).contiguous()
    gates = torch.zeros(2, 33)
    gates[:, -1] = torch.tensor([0.6, 0.8]).logit()
    found = Calibration((1, 2), maps, gates, 0.7)
    found.save(path, {})
    return found


@pytest.fixture(scope="module")
def speech(exp: Path) -> SpeechLLM:
    return SpeechLLM.load(exp, AnswerOptions())


def test_blocks_that_change_nothing_agree_with_the_last(speech: SpeechLLM, data: Path, tmp_path: Path) -> None:
    tables = DataDir.load(data)
    answers = reference_answers(speech, tables)
    found = profile(speech, tables, answers, [1, 2], calibration(tmp_path / "c"), batch_size=5)
    count = sum(map(len, answers.values()))
    assert found.bare.shape == (BLOCKS, count) and len(found.task) == count
    assert int(found.step.sum()) == count - len(answers)
    assert found.mapped is not None
    assert found.bare[CHANGING - 1 :].all()
    assert not found.bare[0].all()
    assert torch.equal(found.mapped, found.bare[:2])  # this map is the identity
    assert found.sureness["gate"].mean(dim=1).tolist() == pytest.approx([0.6, 0.8])
    assert set(found.patience) == {2}
    assert not found.patience[2][0].any()  # nothing has agreed with the first candidate yet
    figures = summarise(found, CostModel(BLOCKS, 2.0, 0.1), 0.7)
    for task in ("asr", "count", "caption"):
        assert figures[task]["agreement"]["bare"]["all"][CHANGING - 1 :] == [1.0, 1.0, 1.0]
        assert figures[task]["oracle"]["all"]["every block, bare"]["saturated"]["mean_depth"] <= CHANGING
    assert figures["count"]["tokens"] == {"all": 8, "step": 4, "first": 4, "later": 0}  # a digit and the end
    assert figures["count"]["agreement"]["bare"]["later"] is None
    (gate,) = [one for one in figures["asr"]["gates"]["gate"] if one["threshold"] == 0.7]
    assert gate["coverage"] == gate["precision"] == 1.0 and gate["mean_depth"] == 2.0


def test_batch_does_not_change_the_profile(speech: SpeechLLM, data: Path) -> None:
    tables = DataDir.load(data)
    answers = reference_answers(speech, tables)
    one, many = (profile(speech, tables, answers, [1], None, size) for size in (1, 12))
    assert torch.equal(one.bare, many.bare)
    assert one.mapped is None and "gate" not in one.sureness
    assert torch.allclose(one.sureness["entropy"], many.sureness["entropy"], atol=1e-5)


def test_the_oracle_on_a_table_made_by_hand() -> None:
    cost = CostModel(blocks=3, head=1.0, memory=0.1)
    #      always, only at last, first yes then no
    same = torch.tensor([[1, 0, 1], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    found = oracle(same, range(1, 4), cost)
    assert found is not None
    assert found["first match"]["mean_depth"] == pytest.approx((1 + 3 + 1) / 3)
    assert found["saturated"]["mean_depth"] == pytest.approx((1 + 3 + 3) / 3)
    assert found["first match"]["speedup"] == pytest.approx(4 / ((2.2 + 4 + 2.2) / 3))
    partly = oracle(same[:1], [1], cost)  # the middle token exits nowhere: block 3
    assert partly is not None and partly["saturated"]["mean_depth"] == pytest.approx(5 / 3)
    assert oracle(same[:, :0], range(1, 4), cost) is None


def test_gates_on_a_table_made_by_hand() -> None:
    cost = CostModel(blocks=4, head=2.0, memory=0.0)
    opened = torch.tensor([[1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    right = torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    found = outcome(opened, right, (1, 2), cost, 0.5)
    two_thirds, speed = pytest.approx(2 / 3), pytest.approx(6 / (13 / 3))
    assert found == Judgement(0.5, two_thirds, 0.5, pytest.approx(7 / 3), speed, checks=pytest.approx(5 / 3))
    checked = outcome(opened, right, (1, 2), cost, 0.5, checked=True)  # 1, 2 and 2 output layers more
    assert checked.speedup == pytest.approx(6 / (13 / 3 + 2 * 5 / 3))
    nobody = outcome(torch.zeros_like(opened), right, (1, 2), cost)
    assert (nobody.coverage, nobody.precision, nobody.speedup) == (0.0, 1.0, 1.0)
    right[:, 2] = False  # two blocks are right for the second token, so the first of them; none for the third
    assert (found.found, outcome(right, right, (1, 2), cost).found) == (0.0, 1.0)
    assert outcome(torch.zeros_like(opened), right, (1, 2), cost).found == pytest.approx(1 / 3)


def test_groups_of_tokens_are_kept_apart() -> None:
    same = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    found = Profile(
        task=["asr", "asr", "asr", "count"],
        step=torch.tensor([False, True, True, False]), piece=["first", "later", "end", "first"],
        layers=(1,), bare=same, mapped=None,
        sureness={"confidence": torch.tensor([[0.1, 0.2, 0.95, 0.9]])}, patience={},
    )  # fmt: skip
    figures = summarise(found, CostModel(2, 0.0, 0.0), None)
    assert set(figures) == {"asr", "count"}
    agreement = figures["asr"]["agreement"]["bare"]
    assert agreement["all"] == pytest.approx([2 / 3, 1.0]) and agreement["step"] == [0.5, 1.0]
    assert (agreement["first"], agreement["later"]) == ([1.0, 1.0], [0.0, 1.0])
    (strict,) = [one for one in figures["asr"]["gates"]["confidence"] if one["threshold"] == 0.9]
    assert strict["coverage"] == 0.5 and strict["precision"] == 1.0  # the end token alone
    assert figures["count"]["gates"] == {} and figures["count"]["oracle"]["step"]["candidate blocks"] is None


def test_times_are_compared_within_a_run(tmp_path: Path) -> None:
    clocks = {"search_wall": 1.0, "search_cpu": 1.0, "steps_cpu": 1.0, "encoders_wall": 1.0}

    def write(name: str, run: str, lines: dict[int, float], rest: str = "") -> None:
        path = tmp_path / name / "timing" / f"{run}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(json.dumps({"batch": at, "steps_wall": wall, **clocks}) + "\n" for at, wall in lines.items()) + rest
        )

    write("never", "a", {0: 4.0, 1: 6.0})
    write("never", "b", {0: 100.0, 2: 8.0}, rest='{"batch": 3, "ste')
    write("point", "a", {1: 3.0})
    write("point", "b", {2: 2.0, 3: 1.0})
    write("point", "c", {0: 0.1})
    found = read_timing(tmp_path / "point", tmp_path / "never")
    assert found is not None
    assert (found["own"]["steps_wall"], found["never"]["steps_wall"]) == (5.0, 14.0)
    assert (found["batches"], found["runs"]) == (2, 2)
    assert read_timing(tmp_path / "point", tmp_path / "absent") is None


@pytest.mark.parametrize("name", ["fixed", "fixed:x", "gate:2", "oracle:1", "confidence", "patience:5", "never:1"])
def test_points_that_cannot_be(name: str) -> None:
    with pytest.raises(ConfigError, match="--sweep"):
        parse_point(name, (1, 2), "c")


def test_points() -> None:
    assert parse_point("fixed:7", (1, 2), "c").exits.layers == (7,)
    entropy = parse_point("entropy:0.7", (1, 2), None).exits
    assert (entropy.mode, entropy.layers, entropy.threshold, entropy.calibration) == ("entropy", (1, 2), 0.7, None)
    gate = parse_point("gate", (1, 2), "c").exits
    assert gate.threshold is None and gate.calibration == "c"


def test_the_command_line_from_end_to_end(exp: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "exit_report"
    args = [str(exp), "--data", str(data), "--out", str(out), "--calibration", str(exp / "exit.safetensors")]
    args += ["--measure_cost", "0"]
    assert report(args) == 0  # without a sweep
    text = (out / "EXIT.md").read_text()
    assert "## Gates" in text and "## Decoding" not in text and (out / "exit.png").stat().st_size > 10000
    first = (out / "profile" / "test.json").stat().st_mtime_ns

    assert report([*args, "--batch_size", "5", "--sweep", "fixed:1", "fixed:2", "gate"]) == 0
    assert (out / "profile" / "test.json").stat().st_mtime_ns == first  # not made twice
    record = read_json(out / "exit_report.json")
    assert record["answers"] == "own" and record["layers"] == [1, 2]
    assert record["calibration"]["threshold"] == 0.7 and set(record["sets"]["test"]) == {"asr", "count", "caption"}
    entries = {(one["task"], one["point"]): one for one in record["sweep"]}
    assert len(entries) == 3 * 4
    assert entries["asr", "never"]["mean_depth"] == BLOCKS and entries["asr", "fixed:1"]["mean_depth"] == 1
    for point in ("fixed:2", "gate"):  # blocks 3 and 4 predict what block 2 does; the gate opens there
        assert entries["asr", point]["mean_depth"] == 2 and entries["asr", point]["same_answers"] == 1
        assert entries["asr", point]["difference"]["wer"]["value"] == 0
    assert any(entries[task, "fixed:1"]["same_answers"] < 1 for task in ("asr", "count", "caption"))
    timing = entries["asr", "gate"]["timing"]
    assert timing["runs"] == 1 and timing["batches"] == 3 and timing["own"]["steps_wall"] > 0
    assert (out / "decode_never" / "test" / "text").read_text() == (exp / "decode_beam" / "test" / "text").read_text()
    text = (out / "EXIT.md").read_text()
    assert "## Decoding" in text and "| test | gate |" in text and "tests/benchmarks/decode.py" in text

    # One more point: full depth takes its turns again, the other points do not.
    assert report([*args, "--batch_size", "5", "--sweep", "fixed:2", "confidence:0.2"]) == 0
    runs = {name: len(list((out / name / "test" / "timing").iterdir())) for name in ("decode_never", "decode_fixed_2")}
    assert runs == {"decode_never": 2, "decode_fixed_2": 1}

    # A killed run: the last batch of one point is missing, and nothing was joined.
    folder = out / "decode_gate" / "test"
    kept = (folder / "text").read_text()
    journal = folder / "split1" / "1" / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-2]) + lines[-2][:30])
    for name in ("stats.json", "scores.json", "text"):
        (folder / name).unlink()
    assert report([*args, "--batch_size", "5", "--sweep", "gate"]) == 0
    assert (folder / "text").read_text() == kept
    entries = {(one["task"], one["point"]): one for one in read_json(out / "exit_report.json")["sweep"]}
    timing = entries["asr", "gate"]["timing"]
    assert timing["runs"] == 2 and timing["batches"] == 3


def test_batches_by_memory_are_the_same_for_every_point(
    exp: Path, speech: SpeechLLM, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tried, search = copy.copy(speech), [], speech_llm.beam_search
    model.on_gpu, model.__dict__["free_memory"] = True, 1 << 40

    def limited(engine: Any, prefix: Any, *args: Any) -> Any:
        tried.append(len(prefix))
        if len(prefix) > 7 and len(tried) % 2 == 0:  # the first point has memory for it, the second has not
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return search(engine, prefix, *args)

    monkeypatch.setattr(speech_llm, "beam_search", limited)
    points = [parse_point(name, (1, 2), None) for name in ("fixed:1", "fixed:2")]
    sweep(exp, lambda: model, [data], points[:1], tmp_path, {}, {"commit": None}, DecodeOptions("auto"), "cuda")
    assert tried == [12, 12, 6, 6, 6, 6]  # the first one is not counted in any time
    sweep(exp, lambda: model, [data], points, tmp_path, {}, {"commit": None}, DecodeOptions("auto"), "cuda")
    assert tried[6:] == [6, 6, 6, 6, 6]
    assert read_json(tmp_path / "decode_never/test/split1/1/batches.json") == {"sizes": [6, 6]}
    own, never = tmp_path / "decode_fixed_1/test", tmp_path / "decode_never/test"
    assert read_json(own / "key.json")["batch_size"] == read_json(own / "stats.json")["batch_size"] == "auto"
    timing = read_timing(own, never)
    assert timing is not None and (timing["batches"], timing["runs"]) == (2, 1)
    assert len(read_table(own / "text")) == len(read_table(tmp_path / "decode_fixed_2/test/text")) == 12


def test_reference_answers_and_layers_of_ones_own(exp: Path, data: Path, tmp_path: Path) -> None:
    args = [str(exp), "--data", str(data), "--out", str(tmp_path), "--answers", "reference"]
    assert report([*args, "--layers", "3", "--measure_cost", "0"]) == 0
    record = read_json(tmp_path / "exit_report.json")
    assert record["answers"] == "reference" and record["layers"] == [3] and record["calibration"] is None
    assert record["sets"]["test"]["count"]["tokens"]["all"] == 8  # "2" and the end token, four times
    assert record["sets"]["test"]["asr"]["oracle"]["all"]["candidate blocks"]["saturated"]["mean_depth"] == 3


def test_errors_say_what_to_type(exp: Path, data: Path, tmp_path: Path) -> None:
    args = [str(exp), "--data", str(data), "--out", str(tmp_path)]
    with pytest.raises(ConfigError, match=r"none\.safetensors.*\n.*pam_calibrate_exit"):
        report([*args, "--calibration", str(tmp_path / "none.safetensors")])
    with pytest.raises(DataError, match=r"no decoded answers(.|\n)*pam_decode --exp(.|\n)*--answers reference"):
        report([*args, "--decode", str(tmp_path / "decode_other")])
    with pytest.raises(ConfigError, match="--layers: \\[4\\]"):
        report([*args, "--layers", str(BLOCKS)])
    with pytest.raises(ConfigError, match="leave one"):
        report([*args, "--layers", "1", "--calibration", str(exp / "exit.safetensors")])
    other = write_data(tmp_path / "other", "test", size=2, seed=5)  # another set of the same name
    with pytest.raises(DataError, match=r"audio_sha256(.|\n)*decode again"):
        report([str(exp), "--data", str(other), "--out", str(tmp_path)])
    early = tmp_path / "decode_early" / "test"
    early.mkdir(parents=True)
    key = read_json(exp / "decode_beam" / "test" / "key.json")
    write_json(early / "key.json", {**key, "search": {"exit": {"mode": "fixed"}}})
    (early / "nbest.jsonl").write_text("")
    with pytest.raises(DataError, match="early exit"):
        report([*args, "--decode", str(early.parent)])


def test_an_llm_that_only_transformers_can_run_has_a_profile_and_no_sweep(
    exp: Path, llm_dir: Path, data: Path, tmp_path: Path
) -> None:
    own = tmp_path / "exp"
    shutil.copytree(exp, own)
    config = tiny_config(llm_dir)
    config["llm_conf"] = {**config.get("llm_conf", {}), "fused_decoding": False}
    write_config(config, own / "config.yaml")
    out = tmp_path / "report"
    args = [str(own), "--data", str(data), "--out", str(out), "--answers", "reference", "--measure_cost", "1"]
    for points in ([], ["never", "fixed:2"]):
        with pytest.raises(ConfigError, match=r"--sweep: .*Llama-type.*leave it out"):
            report([*args, "--sweep", *points])
    assert not list(out.rglob("*.json"))  # refused before the profile is made
    assert report([*args, "--sweep", "never"]) == 0
    record = read_json(out / "exit_report.json")
    assert "has no exits" in record["measured_cost"]["reason"] and record["predictions"] == []
    assert record["sets"]["test"]["count"]["tokens"]["all"] == 8


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom pam_espnet.bin.pam_exit_report import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
