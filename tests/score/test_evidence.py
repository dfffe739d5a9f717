"""Files of evidence, the tables over seeds that are made of them, and READMEs that quote them."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scored import BAD, GOOD, TEXT, make_data, make_decoding

from pam_espnet.bin import pam_evidence
from pam_espnet.cli import run_main
from pam_espnet.data.passport import Passport
from pam_espnet.errors import DataError
from pam_espnet.fileio import read_json, write_json, write_text
from pam_espnet.score import evidence_plots
from pam_espnet.score.evidence import Run, gather, read_run
from pam_espnet.score.evidence_tables import read_runs, readme_tables, write_tables
from pam_espnet.score.scoring import score_directory

ROOT = Path(__file__).resolve().parents[2]
READMES = [ROOT / "README.md", *(ROOT / "egs/mini/pam1" / f"{name}.md" for name in ("README", "EXPERTS", "EARLY_EXIT"))]
EVIDENCE = sorted(ROOT.glob("egs/*/pam1/EVIDENCE_*.json"))


def make_run(name: str, seed: int, correct: list[int], settings: str = "") -> Run:
    utterances = [
        {"utt": f"u{n}", "set": "test", "task": "count", "audio": "on", "hypothesis": "1", "accuracy": [hit, 1]}
        for n, hit in enumerate(correct)
    ]
    made = {"settings": settings, "commit": "0123abc", "command": "./run.sh", "versions": {"torch": "2.14"}}
    processor = {"capability": "AVX2", "bfloat16": False}
    numbers = {"hours_trained": 1.5, "wall_seconds": 60.0, "cpu_seconds": 90.0, "killed_attempts": 0}
    empty: dict[str, Any] = {"routing": {}, "wordings": [], "curve": []}
    return Run(1, name, "quick", seed, utterances=utterances, processor=processor, **empty, **made, **numbers)


def save(run: Run, folder: Path) -> Path:
    write_json(folder / run.file_name, asdict(run))
    return folder / run.file_name


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """exp/pam, decoded with and without audio and in another wording, scored."""
    data = make_data(tmp_path / "dump/test")
    seconds = {key: {"num_samples": 16000 * 36, "sha256": ""} for key in TEXT}
    Passport(16000, "", "", "flac", utterances=seconds).save(data)
    exp = tmp_path / "exp/pam"
    for name, text, audio in (("beam/test", GOOD, "on"), ("beam/test/prompts/2", BAD, "on"), ("off/test", BAD, "zero")):
        score_directory(make_decoding(exp / f"decode_{name}", text, audio), data, resamples=20)
    config = {"seed": 3, "max_epoch": 2, "num_iters_per_epoch": 5, "batching_conf": {"max_utterances": 2}}
    write_text(exp / "config.yaml", yaml.safe_dump(config))
    points = [{"step": 10 * n, "epoch": 1, "split": "train", "acc_asr": 0.1 * n, "loss": 1.0} for n in (1, 2)]
    write_text(exp / "curve.jsonl", "".join(json.dumps(one) + "\n" for one in points))
    write_text(exp / "attempts.txt", "begin\nbegin\n10.5 9 1\nbegin\n2 1.5 0.5\n")
    return exp


def test_a_file_holds_what_the_experiment_measured(experiment: Path, tmp_path: Path) -> None:
    data = tmp_path / "dump/test"
    args = ["--exp", str(experiment), "--train", str(data), "--times", str(experiment / "attempts.txt")]
    args += ["--name", "pam", "--size", "quick", "--settings", "a.b=1", "--folder", str(tmp_path / "evidence")]
    assert run_main(pam_evidence.main, args) == 0
    path = tmp_path / "evidence/pam_quick_3.json"
    run = read_run(path)
    assert (run.seed, run.settings, run.commit, run.command) == (3, "a.b=1", "0123abc", "pam_decode --set 'a b'")
    assert (run.wall_seconds, run.cpu_seconds, run.killed_attempts) == (12.5, 12.0, 1)
    assert run.curve == [{"step": 10, "split": "train", "acc_asr": 0.1}, {"step": 20, "split": "train", "acc_asr": 0.2}]
    # ten batches of one or two utterances of 36 s
    assert 0.1 <= run.hours_trained <= 0.2
    assert {column.metric for column in run.columns()} == {
        "wer",
        "wer_normalised",
        "accuracy",
        "mae",
        "cider_d",
        "rouge_l",
    }
    for column in run.columns():
        scores = {
            audio: read_json(experiment / f"decode_{name}/test/scores.json")["tasks"][column.task][column.metric][
                "value"
            ]
            for audio, name in (("on", "beam"), ("zero", "off"))
        }
        for audio, value in scores.items():
            found = run.statistics(column, audio)
            assert found is not None
            sums = found[1].table.sum(0, keepdims=True)
            if value is not None:
                assert found[1].figures(sums)[0] == pytest.approx(value)
    spoken = next(one for one in run.utterances if one["utt"] == "c1" and one["audio"] == "on")
    assert spoken["hypothesis"] == GOOD["c1"] and spoken["references"] == ["a dog barks", "barking of a dog"]
    assert [(one["number"], one["share"]) for one in run.wordings if one["task"] == "asr"] == [(1, 1.0), (2, 1.0)]
    assert ' "settings": "a.b=1",\n' in path.read_text(encoding="utf-8")  # what run_evidence.sh compares
    (experiment / "curve.jsonl").unlink()  # as of a model that was changed after its training
    changed = gather(
        experiment, data, experiment / "attempts.txt", tmp_path / "changed", name="pam", size="quick", settings="a.b=1"
    )
    assert read_run(changed) == replace(run, curve=[])
    text = write_tables(tmp_path / "evidence", "quick", tmp_path / "EVIDENCE_quick")
    assert "| pam, audio off † |" in text and "## Wordings of the prompt" in text and "expert 0: whisper 0.70" in text
    assert "|  | asr | caption | count | asr – caption | asr – count | caption – count |" in text


def test_rows_are_means_over_seeds_and_paired_with_the_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hits = rng.integers(0, 2, (3, 60))
    for seed, row in enumerate(hits.tolist(), 1):
        save(make_run("pam", seed, row), tmp_path / "evidence")
        save(make_run("worse", seed, [hit * (n % 2) for n, hit in enumerate(row)], "a=1"), tmp_path / "evidence")
    save(make_run("average", 2, hits[1].tolist()), tmp_path / "evidence")
    text = write_tables(tmp_path / "evidence", "quick", tmp_path / "EVIDENCE_quick")
    rows = read_json(tmp_path / "EVIDENCE_quick.json")["rows"]
    assert [(row["experiment"], row["seeds"]) for row in rows] == [
        ("pam", [1, 2, 3]),
        ("average", [2]),
        ("worse", [1, 2, 3]),
    ]
    assert rows[0]["scores"][0]["value"] == pytest.approx(100 * hits.mean())
    assert rows[0]["scores"][0]["by_seed"]["2"] == pytest.approx(100 * hits[1].mean())
    assert rows[1]["difference_to_first"][0]["value"] == 0  # of seed 2, which both have
    worse = rows[2]["difference_to_first"][0]
    assert worse["value"] == pytest.approx(-100 * hits[:, ::2].sum() / 180) and worse["high"] < 0
    assert "| average † |" in text and "| pam, 3 seeds |" in text and "| worse | **-" in text and "+0.0] † |" in text
    for name in ("", "_curves", "_weights"):
        assert (tmp_path / f"EVIDENCE_quick{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2; this version reads 1"),
        ({"seed": "1"}, "seed is '1'"),
        ({"extra": 1}, "unexpected keyword argument 'extra'"),
        ({"seed": 2}, r"belongs into pam_quick_2\.json\n  -> rename it"),
        ({"utterances": [{"utt": "a"}]}, "an utterance with the keys utt alone"),
        (
            {"utterances": [{**make_run("pam", 1, [1]).utterances[0], "accuracy": "x"}]},
            "is no evidence: could not convert",
        ),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = save(make_run("pam", 1, [1, 0]), tmp_path)
    write_json(path, {**read_json(path), **change})
    with pytest.raises(DataError, match=message):
        read_run(path)
    path.write_text("[1")
    with pytest.raises(DataError, match="restore the committed file"):
        read_run(path)


def test_runs_of_a_table_have_the_same_settings_and_utterances(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \*_quick_\*\.json here\n  -> make them: \./run_evidence\.sh"):
        read_runs(tmp_path, "quick")
    save(make_run("pam", 1, [1, 0]), tmp_path)
    save(replace(make_run("pam", 2, [1, 1]), settings="a=1"), tmp_path)
    with pytest.raises(DataError, match=r"pam_quick_2\.json: has the settings 'a=1', but pam_quick_1\.json ''"):
        read_runs(tmp_path, "quick")
    save(make_run("pam", 2, [1, 1, 0]), tmp_path)
    with pytest.raises(DataError, match=r"pam_quick_2\.json: has other utterances in test than pam_quick_1\.json"):
        read_runs(tmp_path, "quick")


def test_marked_tables_of_a_readme_are_made_anew(tmp_path: Path) -> None:
    for name, settings in (("pam", ""), ("average", ""), ("joint", "a=1")):
        save(make_run(name, 1, [1, 0], settings), tmp_path / "evidence")
    write_tables(tmp_path / "evidence", "quick", tmp_path / "EVIDENCE_quick")
    readme = tmp_path / "README.md"
    write_text(readme, "before\n<!-- table: EVIDENCE_quick.json -->\n| 99.9 |\n<!-- end -->\nafter\n")
    assert run_main(pam_evidence.main, ["--readme", str(readme)]) == 0
    text = readme.read_text(encoding="utf-8")
    assert "| pam † | 50.0 [0.0, 100.0] |" in text and "| average † |" in text and "99.9" not in text
    assert "joint" not in text  # a variant
    marked = text.replace("EVIDENCE_quick.json -->", "EVIDENCE_quick.json of pam,joint -->")
    write_text(readme, marked)
    found = readme_tables(readme)
    assert "| pam † |" in found and "| joint † |" in found and "average" not in found
    write_text(readme, marked.replace("joint -->", "static -->"))
    with pytest.raises(DataError, match=r"EVIDENCE_quick\.json: no static\n  -> there are pam, average, joint"):
        readme_tables(readme)
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
    write_text(readme, "<!-- table: none.json -->\n<!-- end -->\n")
    with pytest.raises(DataError, match=r"table of none\.json: no such file"):
        readme_tables(readme)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_numbers_in_the_readmes_are_those_of_the_json(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    assert "<!-- table: " in text and readme_tables(readme) == text, f"pam_evidence --readme {readme}"


@pytest.mark.parametrize("path", EVIDENCE, ids=lambda path: path.stem)
def test_committed_tables_are_those_of_the_committed_files(path: Path, tmp_path: Path) -> None:
    size = path.stem.removeprefix("EVIDENCE_")
    text = write_tables(path.parent / "evidence", size, tmp_path / path.stem)
    assert text == path.with_suffix(".md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / path.name).read_text()) == read_json(path)


def test_of_two_seeds_both_are_shown(tmp_path: Path) -> None:
    for seed, row in ((1, [1, 0, 0, 0]), (2, [1, 1, 1, 0])):
        save(make_run("pam", seed, row), tmp_path)
    assert "| pam, 2 seeds | 50.0 (25.0, 75.0) |" in write_tables(tmp_path, "quick", tmp_path / "EVIDENCE_quick")


def test_times_of_a_run_with_a_killed_attempt_are_a_least(tmp_path: Path) -> None:
    """That attempt's work is kept and its time unknown: a whole row's time would look too short beside the others."""
    save(make_run("pam", 1, [1, 0]), tmp_path)
    save(replace(make_run("pam", 2, [1, 1]), killed_attempts=2), tmp_path)
    text = write_tables(tmp_path, "quick", tmp_path / "EVIDENCE_quick")
    assert "| 1.50 | 1.0 | 1.5 | 0 |" in text and "| 1.50 | > 1.0 | > 1.5 | 2 |" in text


def test_curves_and_weights_are_drawn_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean and band of the seeds at each step, also where one has no such task; bars that lie end to end."""
    figures = []
    monkeypatch.setattr(evidence_plots, "save_figure", lambda figure, path: figures.append(figure))
    curves = [
        [
            {"step": 10, "split": "train", "acc_asr": 0.2, "acc_count": 0.5},
            {"step": 20, "split": "train", "acc_asr": 0.4},
        ],
        [{"step": 10, "split": "train", "acc_asr": 0.4}, {"step": 20, "split": "valid", "acc_asr": 0.9}],
    ]
    evidence_plots.plot_curves({"pam": curves}, tmp_path / "a.png")
    asr, count = figures[0].axes
    assert np.allclose(asr.lines[0].get_xydata(), [[10, 30], [20, 40]]) and asr.get_title() == "asr"
    assert np.allclose(count.lines[0].get_xydata(), [[10, 50]])
    edges = asr.collections[0].get_paths()[0].vertices[:, 1]
    assert edges.min() == pytest.approx(20) and edges.max() == pytest.approx(40)
    own = {"asr": {"whisper": 0.75, "yamnet": 0.25}}
    evidence_plots.plot_weights({"pam, seed 1": own, "pam, seed 2": {"asr": {"yamnet": 1.0}}}, tmp_path / "b.png")
    bars = [(bar.get_x(), bar.get_width()) for bar in figures[1].axes[0].patches]
    assert bars == [(0, 0.75), (0, 0), (0.75, 0.25), (0, 1)]
