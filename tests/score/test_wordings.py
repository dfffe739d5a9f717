"""The spread of scores over the wordings of a question, and where it is reported."""

import json
from pathlib import Path

import pytest

from pam_espnet.data.datadir import DataDir
from pam_espnet.data.tables import write_table
from pam_espnet.fileio import read_json, write_text
from pam_espnet.score.report import read_spread, write_report
from pam_espnet.score.scoring import score_directory

TEXT = {"a1": "one two three four", "c1": "2", "c2": "3"}
TASKS = {"a1": "asr", "c1": "count", "c2": "count"}
# by number of the wording; only count has a third one
DECODED = {
    1: {"a1": "one two three four", "c1": "2", "c2": "3"},
    2: {"a1": "one two three", "c1": "2", "c2": "4"},
    3: {"c1": "1", "c2": "4"},
}


@pytest.fixture
def decoded(tmp_path: Path) -> Path:
    """exp/x/decode_beam/test, asked in three wordings."""
    for number, answers in DECODED.items():
        data, folder = tmp_path / f"data{number}", tmp_path / "exp/x/decode_beam/test"
        folder = folder if number == 1 else folder / "prompts" / str(number)
        prompts = {key: f"Wording {number} of {TASKS[key]}" for key in answers}
        tables = {key: {utt: table[utt] for utt in answers} for key, table in (("text", TEXT), ("utt2task", TASKS))}
        tables |= {"wav": {k: f"{k}.wav" for k in answers}, "prompt": prompts, "utt2spk": {k: k for k in answers}}
        DataDir(data, **tables).save()
        folder.mkdir(parents=True)
        write_table(folder / "text", answers)
        routing = {"expert": 0, "expert_probs": [1.0], "encoders": {"one": 1.0}, "layers": {"one": [1.0]}}
        lines = [{"utt": k, "task": TASKS[k], "prompt": prompts[k], "routing": routing} for k in answers]
        write_text(folder / "nbest.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        score_directory(folder, data, resamples=10)
    return tmp_path / "exp/x/decode_beam/test"


def test_mean_and_extremes_of_each_task(decoded: Path) -> None:
    asr, count = sorted(read_spread(decoded), key=lambda entry: entry["task"])
    assert (asr["metric"], asr["mean"], asr["min"], asr["max"]) == ("wer", 12.5, 0.0, 25.0)
    assert [wording["value"] for wording in count["wordings"]] == [100.0, 50.0, 0.0]
    assert [wording["example"] for wording in count["wordings"]] == [f"Wording {n} of count" for n in (1, 2, 3)]
    assert (count["metric"], count["mean"], count["min"], count["max"]) == ("accuracy", 50.0, 0.0, 100.0)


def test_the_report_has_the_spread_and_scores_of_the_first_wording_alone(decoded: Path) -> None:
    report = write_report(decoded.parents[1])
    text = report.read_text(encoding="utf-8")
    assert "| beam | test | count | accuracy % ↑ | 3 | 50.0 | 0.0 | 100.0 |" in text
    results = read_json(report.with_name("results.json"))
    assert len(results["wordings"]) == 2 and len(results["decodings"]) == 1
    assert results["decodings"][0]["tasks"]["asr"]["wer"]["value"] == 0.0


def test_one_wording_has_no_spread(decoded: Path) -> None:
    for path in sorted((decoded / "prompts").glob("*/scores.json")):
        path.unlink()
    assert read_spread(decoded) == []
    report = write_report(decoded.parents[1])
    assert "Wordings" not in report.read_text(encoding="utf-8")
    assert "wordings" not in read_json(report.with_name("results.json"))
