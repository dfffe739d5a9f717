"""From decode directories to scores, a report, pictures and a comparison."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scored import BAD, GOOD, TEXT, make_data, make_decoding

from pam_espnet.bin import pam_score
from pam_espnet.cli import code_commit, run_main
from pam_espnet.data.passport import Passport
from pam_espnet.data.tables import write_table
from pam_espnet.errors import DataError
from pam_espnet.fileio import read_json, sha256_file, write_json, write_text
from pam_espnet.score.compare import compare, find_rows
from pam_espnet.score.plots import plot_curve, plot_routing, read_curve
from pam_espnet.score.report import find_decodings, write_report
from pam_espnet.score.routing import TaskRouting, read_routing
from pam_espnet.score.scoring import format_scores, score_directory


@pytest.fixture
def experiments(tmp_path: Path) -> Path:
    """exp/pam (decoded with and without audio) and exp/average, scored."""
    data = make_data(tmp_path / "dump" / "test")
    for name, text, options in (
        ("pam/decode_beam/test", GOOD, {}),
        ("pam/decode_beam_off/test", BAD, {"audio": "zero"}),
        ("average/decode_beam/test", GOOD, {"experts": 1}),
    ):
        score_directory(make_decoding(tmp_path / "exp" / name, text, **options), data, resamples=50)
    return tmp_path / "exp"


def test_each_task_by_its_metric(experiments: Path) -> None:
    scores = read_json(experiments / "pam/decode_beam/test/scores.json")
    tasks = scores["tasks"]
    assert sorted(tasks) == ["asr", "caption", "count"]
    assert tasks["asr"]["wer"]["value"] == pytest.approx(100 / 6)
    assert tasks["asr"]["wer"] | {"substitutions": 1, "words": 6, "n": 2} == tasks["asr"]["wer"]
    assert tasks["count"]["accuracy"]["value"] == 50.0
    assert tasks["count"]["mae"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 2, "left_out": 1}
    assert tasks["caption"]["rouge_l"]["value"] == 1.0
    assert scores["details"]["caption"]["references_per_utterance"] == {"2": 2}
    assert scores["speed"]["rtf"] == 0.25 and scores["speed"]["tokens_per_second"] == 10.0
    assert scores["normaliser"]["version"] == scores["versions"]["whisper-normalizer"]
    lines = (experiments / "pam/decode_beam/test/utt_scores.jsonl").read_text().splitlines()
    assert [json.loads(line)["utt"] for line in lines] == ["a1", "a2", "c1", "c2", "b1", "b2"]
    assert json.loads(lines[1])["wer"] == [1, 3]
    assert "WER % ↓" in format_scores(scores) and "real-time factor 0.25" in format_scores(scores)
    off = read_json(experiments / "pam/decode_beam_off/test/scores.json")["details"]["asr"]
    assert (off["loops"], off["empty_hypotheses"]) == (1, 1)


def test_keys_must_agree(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    few = make_decoding(tmp_path / "few", {key: TEXT[key] for key in ("a1", "b1", "c1", "c2")})
    with pytest.raises(DataError, match=r"no hypothesis for 2 utterances \(a2, b2\) of "):
        score_directory(few, data)
    assert not (few / "scores.json").exists()
    many = make_decoding(tmp_path / "many", {**TEXT, "a3": "?"})
    with pytest.raises(DataError, match=r"hypotheses for 1 utterance \(a3\) that .* does not have"):
        score_directory(many, data)
    twice = make_decoding(tmp_path / "twice", TEXT)
    (twice / "text").write_text("a1 x\na1 y\n")
    with pytest.raises(DataError, match="duplicate"):
        score_directory(twice, data)


def test_a_count_reference_that_is_no_number_names_its_line(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    write_table(data / "text", {**TEXT, "b2": "a few"})
    with pytest.raises(DataError, match=r"text:4: the reference of 'b2' is not a number"):
        score_directory(make_decoding(tmp_path / "d", TEXT), data)


def test_without_statistics_and_references(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = make_data(tmp_path / "data")
    (data / "references").unlink()
    decoding = make_decoding(tmp_path / "x/decode_beam/test", TEXT)
    (decoding / "stats.json").unlink()
    (decoding / "nbest.jsonl").unlink()
    scores = score_directory(decoding, data, resamples=10)
    assert scores["speed"] is None and "no speed is reported" in caplog.text
    assert "2 of 2 captions have one reference only" in caplog.text
    report = write_report(tmp_path / "x").read_text(encoding="utf-8")
    assert "## Speed" not in report and "## Routing" not in report
    assert "learning_curve.png" not in report and "routing.png" not in report


def test_report(experiments: Path) -> None:
    exp = experiments / "pam"
    points = [{"step": step, "epoch": 1, "split": "train", "loss": 1 / step, "acc": 0.5} for step in (1, 2, 3)]
    points += [{"step": 3, "epoch": 1, "split": "valid", "loss": 0.5, "acc": 0.4, "loss_asr": 0.3}]
    write_text(exp / "curve.jsonl", "".join(json.dumps(point) + "\n" for point in points))
    write_text(exp / "model.safetensors", "weights")
    write_json(exp / "decode_beam/test/key.json", {"checkpoint_sha256": sha256_file(exp / "model.safetensors")})
    write_json(exp / "decode_beam_off/test/key.json", {"checkpoint_sha256": "0" * 64})
    report = write_report(exp).read_text(encoding="utf-8")
    for text in (
        "# pam\n",
        "| beam | test | asr | WER % ↓ | 16.7 [0.0, 33.3] | 2 | substitutions 1, deletions 0",
        "| beam_off (audio off) | test | count | accuracy % ↑ | 0.0",
        "| asr | 2 | expert 0: whisper 0.70, yamnet 0.30 |",
        "REF: on the mat\nHYP: on   a mat\n          S",
        "| **3** | 0 | 0 | 1 |",
        "pam_decode --set 'a b'",
        "commit 0123abc",
        "**beam_off, test was decoded with another checkpoint**",
        "![Learning curve](learning_curve.png)",
        "![Answers](confusion.png)",
        "| true | utterances | accuracy % | MAE | not a number |",
        "| 3 | 1 | 0.0 | – | 1 |",
        "- METEOR: not installed",
    ):
        assert text in report
    assert "**beam, test was" not in report
    table = (exp / "RESULTS.txt").read_text(encoding="utf-8")
    assert "beam_off (audio off)" in table and "BLEU-4 ↑" in table and "|" not in table
    for name in ("learning_curve.png", "routing.png", "confusion.png"):
        assert (exp / name).read_bytes().startswith(b"\x89PNG")
    results = read_json(exp / "results.json")
    assert results["checkpoint"]["bytes"] == 7
    assert [(entry["decode"], entry["audio"]) for entry in results["decodings"]] == [
        ("beam", "on"),
        ("beam_off", "zero"),
    ]
    assert results["routing"]["caption"]["expert"] == 1


def test_espnet_s_tables(experiments: Path) -> None:
    exp, head = experiments / "pam", "| dataset | Snt | Wrd | Corr | Sub | Del | Ins | Err | S.Err |"
    head_commit = code_commit()
    for name in ("beam", "beam_off"):
        stats = exp / f"decode_{name}/test/stats.json"
        versions = {"python": "3.12.1", "espnet": "202611", "torch": "2.14"}
        write_json(stats, {**read_json(stats), "commit": head_commit, "versions": versions})
    report = write_report(exp).read_text(encoding="utf-8")
    section = report.split("## As ESPnet reports it\n")[1].split("\n## ")[0]
    # "on the mat" as "on a mat": one of six words. Then all is "no": a1 is empty, a2 has four words for three
    words = section.split("### WER\n\n")[1].split("\n\n")[0].splitlines()
    assert words == [
        head,
        "| " + " | ".join(["---"] * 9) + " |",
        "| decode_beam/test | 2 | 6 | 83.3 | 16.7 | 0.0 | 0.0 | 16.7 | 50.0 |",
        "| decode_beam_off/test | 2 | 6 | 0.0 | 50.0 | 50.0 | 16.7 | 116.7 | 100.0 |",
    ]
    assert section.count(head) == 4  # CER, and both normalised
    environments = section.split("### Environments\n\n")[1].split("\n\n")[0].splitlines()
    assert environments[1:4] == [
        "- python version: `3.12.1`",
        "- espnet version: `espnet 202611`",
        "- pytorch version: `pytorch 2.14`",
    ]
    if head_commit:  # a checkout; a copy without git has neither
        assert environments[4] == f"- Git hash: `{head_commit}`" and environments[5].startswith("  - Commit date: `")


def test_compare(experiments: Path) -> None:
    shown = compare([experiments / "pam", experiments / "average"], experiments / "RESULTS.md")
    text = (experiments / "RESULTS.md").read_text(encoding="utf-8")
    assert "<br>" not in shown and "**" not in shown and "Difference to pam" in shown  # the same, for a terminal
    assert shown.count("\naverage ") == 2
    rows = read_json(experiments / "RESULTS.json")["rows"]
    assert [row["experiment"] for row in rows] == ["pam", "pam, audio off", "average"]
    # the same hypotheses: no difference, not bold
    assert "| average | +0.0 [+0.0, +0.0], p = 1.000 |" in text
    assert "| average | whisper 0.70, yamnet 0.30 |" in text  # one expert: none is named
    off = {(entry["task"], entry["metric"]): entry for entry in rows[1]["difference_to_first"]}
    # 12 errors (a1 empty: 3 deletions; a2: 3 substitutions and an insertion) against 1, over 6 words
    assert off["asr", "wer"]["value"] == pytest.approx(100 * (7 - 1) / 6)
    assert "| pam, audio off | **+100.0 [" in text
    assert off["asr", "wer"]["p"] == pytest.approx(0.5, abs=0.05)  # two utterances: half of the ways to swap them
    assert rows[0]["difference_to_first"] == []
    # a single decoding can be named as well
    assert [row.label for row in find_rows([experiments / "pam" / "decode_beam"])] == ["pam"]


def test_compare_leaves_out_what_is_no_pair(experiments: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "other")
    for name in ("text", "prompt", "utt2task", "utt2spk", "wav.scp"):
        lines = (data / name).read_text().splitlines(keepends=True)
        (data / name).write_text("".join(line for line in lines if not line.startswith("a1")))
    decoding = make_decoding(experiments / "short/decode_beam/test", {k: v for k, v in TEXT.items() if k != "a1"})
    score_directory(decoding, data, resamples=10)
    compare([experiments / "average", experiments / "short"], experiments / "RESULTS.md")
    assert "| short | – | – | " in (experiments / "RESULTS.md").read_text(encoding="utf-8")


def test_a_list_of_ids_is_scored_beside_the_whole_set(experiments: Path, tmp_path: Path) -> None:
    data = tmp_path / "dump" / "test"
    ids = tmp_path / "common.txt"
    ids.write_text("# both have these\na1 x\nb1\n\nc1\nelsewhere\n")
    whole = (experiments / "pam/decode_beam/test/scores.json").read_text()
    decoding = experiments / "pam/decode_beam/test"
    scores = score_directory(decoding, data, ids=ids, resamples=10)
    assert scores["utterances"] == 3 and scores["ids"] == {"file": str(ids), "listed": 4}
    assert scores["tasks"]["asr"]["wer"]["value"] == 0.0  # a1 alone
    assert (decoding / "scores.json").read_text() == whole
    assert read_json(experiments / "pam/decode_beam.common/test/scores.json") == scores
    assert f"only those in {ids}, which lists 4" in format_scores(scores)
    score_directory(experiments / "average/decode_beam/test", data, ids=ids, resamples=10)
    pair = [experiments / name / "decode_beam.common" for name in ("pam", "average")]
    compare(pair, experiments / "RESULTS.md")
    assert "| average | +0.0 | " in (experiments / "RESULTS.md").read_text()  # of one utterance there is no interval
    assert "| beam.common | test | asr |" in write_report(experiments / "pam").read_text(encoding="utf-8")
    ids.write_text("nobody\n")
    with pytest.raises(DataError, match="names no utterance"):
        score_directory(decoding, data, ids=ids)
    with pytest.raises(DataError, match="cannot be read"):
        score_directory(decoding, data, ids=tmp_path / "absent")


def test_how_much_of_the_set_was_scored(experiments: Path, tmp_path: Path) -> None:
    data = tmp_path / "dump" / "test"
    passport = Passport(16000, "", "", "flac", utterances={key: {} for key in TEXT})
    passport.skipped = {"d1": "missing: Video unavailable", "d2": "missing: in no folder", "d3": "silent: peak 0"}
    passport.save(data)
    decoding = experiments / "pam/decode_beam/test"
    scores = score_directory(decoding, data, resamples=10)
    assert scores["coverage"] == {"scored": 6, "of": 9, "skipped": {"missing": 2, "silent": 1}}
    assert "scored 6 of the 9 utterances of this set (skipped: 2 missing, 1 silent)" in format_scores(scores)
    report = write_report(experiments / "pam").read_text(encoding="utf-8")
    assert "- beam, test: 6 of 9 scored (2 missing, 1 silent)" in report


def test_results_of_an_older_version_are_read(experiments: Path) -> None:
    """Without the keys and figures that came later."""
    for file in experiments.glob("*/decode_*/test/scores.json"):
        scores = read_json(file)
        del scores["coverage"], scores["ids"]
        caption = scores["tasks"]["caption"]
        scores["tasks"]["caption"] = {name: caption[name] for name in ("cider_d", "rouge_l")}
        del scores["details"]["caption"]["not_computed"], scores["details"]["count"]["per_count"]
        write_json(file, scores)
        lines = [json.loads(line) for line in file.with_name("utt_scores.jsonl").read_text().splitlines()]
        kept = [{k: v for k, v in line.items() if not k.startswith("bleu")} for line in lines]
        write_text(file.with_name("utt_scores.jsonl"), "".join(json.dumps(line) + "\n" for line in kept))
        assert "ROUGE-L" in format_scores(scores)
    assert "CIDEr-D" in write_report(experiments / "pam").read_text(encoding="utf-8")
    assert "CIDEr-D" in compare([experiments / "pam", experiments / "average"], experiments / "RESULTS.md")


def test_missing_scores_have_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="stage 5"):
        find_decodings(tmp_path)


def test_broken_lines_are_named(tmp_path: Path) -> None:
    curve = tmp_path / "curve.jsonl"
    curve.write_text('{"step": 1, "split": "train", "loss": 1.0}\n{"step": 2, "spl')
    assert [entry["step"] for entry in read_curve(curve)] == [1]  # a killed run's last line
    curve.write_text('{"step": 1, "split": "train", "loss": 1.0}\nnonsense\n')
    with pytest.raises(DataError, match=r"curve\.jsonl:2"):
        read_curve(curve)
    nbest = tmp_path / "nbest.jsonl"
    nbest.write_text('{"task": "asr"}\n')
    with pytest.raises(DataError, match=r"nbest\.jsonl:1"):
        read_routing([nbest])


def test_a_resumed_curve_keeps_the_later_point(tmp_path: Path) -> None:
    curve = tmp_path / "curve.jsonl"
    lines = [{"step": step, "split": "train", "loss": loss} for step, loss in ((1, 3.0), (2, 2.0), (2, 1.5), (3, 1.0))]
    curve.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [entry["loss"] for entry in read_curve(curve)] == [3.0, 1.5, 1.0]


def test_pictures_of_long_runs_and_many_layers(tmp_path: Path) -> None:
    import numpy as np

    entries = [{"step": step, "split": "train", "loss": 1.0} for step in range(200)]
    plot_curve(entries, tmp_path / "curve.png")
    row = TaskRouting(3, np.array([1.0]), np.array([1.0]), {"large": np.full(33, 0.03), "small": np.array([0.01])})
    plot_routing({"asr": row}, tmp_path / "routing.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("curve.png", "routing.png"))
    assert row.describe() == "large 0.99, small 0.01"


def test_distance_of_weights_counts_layers_and_encoders_that_one_task_lacks() -> None:
    import numpy as np

    def task(**layers: list[float]) -> TaskRouting:
        return TaskRouting(1, np.array([1.0]), np.array([1.0]), {name: np.array(own) for name, own in layers.items()})

    one = task(whisper=[0.75, 0.0], yamnet=[0.25])
    assert one.distance(one) == 0
    assert one.distance(task(whisper=[0.0, 0.75], yamnet=[0.25])) == pytest.approx(0.75)  # the same encoders
    assert one.distance(task(pyannote=[0.5, 0.5])) == pytest.approx(1)


def test_one_command_scores_every_set_of_every_decoding_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [make_data(tmp_path / "dump/raw" / name) for name in ("one", "two")]
    exp = tmp_path / "exp/x"
    for name in ("beam", "beam_audio_off"):
        for data in sets if name == "beam" else sets[1:]:  # the control of some sets only
            make_decoding(exp / f"decode_{name}" / data.name, GOOD)
    make_decoding(exp / "decode_beam/one/prompts/2", BAD)
    make_data(tmp_path / "dump/prompts/one/2")
    args = ["--exp", str(exp), "--data", *map(str, sets), "--resamples", "20"]
    args += ["--decode_name", "beam", "beam_audio_off", "--prompts", str(tmp_path / "dump/prompts")]
    assert run_main(pam_score.main, args) == 0
    assert len(list(exp.glob("decode_*/*/scores.json"))) == 3
    assert (exp / "decode_beam/one/prompts/2/scores.json").exists()
    assert read_json(exp / "results.json")["wordings"][0]["set"] == "one"
    shown = capsys.readouterr().out
    assert "decode_beam_audio_off/two/scores.json:\n" in shown and (exp / "RESULTS.txt").read_text() in shown
    (exp / "RESULTS.md").unlink()
    assert run_main(pam_score.main, ["--exp", str(exp)]) == 0 and (exp / "RESULTS.md").exists()  # the report alone
    assert run_main(pam_score.main, ["--exp", str(exp), "--data", str(sets[0]), str(tmp_path / "other/one")]) == 1
    assert "two sets have the name 'one'" in capsys.readouterr().err
    assert run_main(pam_score.main, ["--exp", str(exp), "--data", str(tmp_path / "dump/raw/three")]) == 1
    assert "decode_beam/three: no such decoding\n  -> decode this set first" in capsys.readouterr().err
    assert run_main(pam_score.main, [*args[:3], str(sets[0]), "--decode_name", "beam", "beam_audio_off"]) == 1
    assert "decode_beam_audio_off/one: no such decoding" in capsys.readouterr().err


def test_command_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(tmp_path / "data")
    decoding = make_decoding(tmp_path / "x/decode_beam/test", GOOD)
    assert run_main(pam_score.main, ["--decode_dir", str(decoding), "--data_dir", str(data), "--resamples", "20"]) == 0
    assert "CIDEr-D" in capsys.readouterr().out
    output = tmp_path / "RESULTS.md"
    assert run_main(pam_score.main, ["--compare", str(tmp_path / "x"), "--output", str(output)]) == 0
    assert output.read_text(encoding="utf-8").startswith("# Results\n")
    assert run_main(pam_score.main, ["--decode_dir", str(tmp_path), "--data_dir", str(data)]) == 1
    assert "no such file" in capsys.readouterr().err
    for wrong in (["--compare", "x"], ["--exp", "x", "--output", "y.md"], [], ["--decode_dir", "x"]):
        with pytest.raises(SystemExit):
            pam_score.main(wrong)


def test_help_imports_nothing_heavy(repo_root: Path) -> None:
    code = (
        "import sys; from pam_espnet.bin import pam_score as m; m.build_parser().format_help(); "
        "sys.exit(bool({'numpy', 'jiwer', 'matplotlib', 'torch', 'scipy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=repo_root)
