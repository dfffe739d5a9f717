"""Decoding a data directory: resumable, sharded, each utterance exactly once, the control without audio."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import tiny_config, write_data, write_exp

from pam_espnet.bin.pam_decode import main
from pam_espnet.config import write_config
from pam_espnet.data.format import format_data_dir
from pam_espnet.data.tables import read_table
from pam_espnet.decode import shards as decoding
from pam_espnet.decode.options import AnswerOptions
from pam_espnet.decode.shards import DecodeOptions, shard_keys
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.errors import CheckpointError, ConfigError, DataError
from pam_espnet.fileio import read_json, save_trained
from pam_espnet.model import ESPnetPaMModel, build_model
from pam_espnet.score.scoring import score_directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), "test", size=3)


@pytest.fixture(scope="module")
def exp(tiny_llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exp")
    torch.manual_seed(0)
    config = tiny_config(tiny_llm_dir)
    save_trained(build_model(config).state_dict(), path / "model.safetensors")
    write_config(config, path / "config.yaml")
    write_config({"beam_size": 2, "max_new_tokens": 8, "nbest": 2}, path / "decode.yaml")
    return path


def decode(exp: Path, data: Path, out: Path, *more: str) -> int:
    args = ["--exp", str(exp), "--data", str(data), "--out", str(out), "--config", str(exp / "decode.yaml")]
    return main([*args, "--batch_size", "4", *more])


@pytest.fixture(scope="module")
def decoded(exp: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("decoded")
    assert decode(exp, data, out) == 0
    return out


def test_a_model_that_does_not_fit_is_refused_in_words(
    exp: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 140 GiB")

    monkeypatch.setattr(ESPnetPaMModel, "to", full)
    with pytest.raises(ConfigError, match=r"holds the whole LLM there.*140 GiB\n  -> choose a GPU with more memory"):
        decode(exp, data, tmp_path)


def test_outputs(decoded: Path, data: Path) -> None:
    keys = list(read_table(data / "text"))
    assert list(read_table(decoded / "text", allow_empty=True)) == keys
    assert list(read_table(decoded / "score")) == keys
    entries = [json.loads(line) for line in (decoded / "nbest.jsonl").read_text().splitlines()]
    assert [entry["utt"] for entry in entries] == keys
    for entry in entries:
        scores = [hypothesis["score"] for hypothesis in entry["hypotheses"]]
        assert len(scores) == 2 and scores == sorted(scores, reverse=True)
        assert sum(entry["routing"]["encoders"].values()) == pytest.approx(1.0, abs=1e-4)
    stats = read_json(decoded / "stats.json")
    assert stats["seconds_audio"] == pytest.approx(9 * 0.7, abs=0.01)
    assert stats["audio"] == "on" and stats["tokens"] > 0 and stats["seconds_wall"] > 0


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="int8 needs FBGEMM (x86)")
def test_archives_give_the_same_hypotheses(decoded: Path, exp: Path, data: Path, tmp_path: Path) -> None:
    archived = tmp_path / "dump" / data.name
    format_data_dir(data.parents[1] / "data" / data.name, archived, archive_mb=0.05)
    assert len(list(archived.glob("*.ark"))) > 1
    assert decode(exp, archived, tmp_path / "out") == 0
    assert (tmp_path / "out/key.json").read_bytes() == (decoded / "key.json").read_bytes()
    nbest = [
        [json.loads(line)["hypotheses"] for line in (folder / "nbest.jsonl").read_text().splitlines()]
        for folder in (decoded, tmp_path / "out")
    ]
    assert nbest[0] == nbest[1]


def test_int8_is_named_in_the_statistics(exp: Path, data: Path, tmp_path: Path) -> None:
    assert decode(exp, data, tmp_path, "--dtype", "int8", "--limit", "3") == 0
    assert read_json(tmp_path / "stats.json")["dtype"] == "int8"
    with pytest.raises(DataError, match=r"key\.json"):  # another precision is another run
        decode(exp, data, tmp_path, "--dtype", "float32", "--limit", "3")


def test_arguments_of_answer_must_fit_together(tiny_llm_dir: Path) -> None:
    speech, wave = SpeechLLM(build_model(tiny_config(tiny_llm_dir)), AnswerOptions()), np.ones(8000, np.float32)
    assert speech.answer([], []) == []
    with pytest.raises(ConfigError, match="1 waveforms, 2 prompts"):
        speech.answer([wave], ["Hi", "Who speaks?"])
    with pytest.raises(ConfigError, match="2 tasks"):
        speech.answer([wave], ["Hi"], ["asr", "count"])
    with pytest.raises(ConfigError, match="waveform 1: has no samples"):
        speech.answer([wave, wave[:0]], ["Hi", "Hi"])


def test_a_calibration_must_be_there_when_it_is_used(exp: Path, data: Path, tmp_path: Path) -> None:
    for mode, layers in (("gate", "[]"), ("never", "[]")):
        config = tmp_path / f"{mode}.yaml"
        config.write_text(f"exit: {{mode: {mode}, layers: {layers}, calibration: nowhere.safetensors}}\n")
        if mode == "gate":
            with pytest.raises(ConfigError, match=r"no file nowhere\.safetensors"):
                decode(exp, data, tmp_path / mode, "--config", str(config))
        else:
            assert decode(exp, data, tmp_path / mode, "--config", str(config), "--limit", "2") == 0


def test_the_bar_shows_the_step_of_a_long_batch(
    exp: Path, data: Path, tmp_path: Path, decoded: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(decoding, "REFRESH", 0.0)
    decode(exp, data, tmp_path)
    assert "token 2, 4 running" in capsys.readouterr().err
    assert (tmp_path / "score").read_text() == (decoded / "score").read_text()


def test_scoring_takes_it(decoded: Path, data: Path) -> None:
    scores = score_directory(decoded, data, resamples=20)
    assert set(scores["tasks"]) == {"asr", "count", "caption"}


def test_shards_give_the_same_hypotheses(decoded: Path, exp: Path, data: Path, tmp_path: Path) -> None:
    for shard in ("1/2", "2/2"):
        assert decode(exp, data, tmp_path, "--shard", shard) == 0
    assert decode(exp, data, tmp_path, "--shard", "1/2", "--merge") == 0
    assert (tmp_path / "text").read_text() == (decoded / "text").read_text()
    scores = read_table(decoded / "score")
    for utt, score in read_table(tmp_path / "score").items():
        assert float(score) == pytest.approx(float(scores[utt]), abs=1e-5)


def test_one_process_decodes_several_directories(
    decoded: Path, exp: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_data(tmp_path / "other", "more", size=2, seed=3)
    outs = [str(tmp_path / "one"), str(tmp_path / "two")]
    args = ["--exp", str(exp), "--data", str(data), str(other), "--out", *outs, "--config", str(exp / "decode.yaml")]
    assert main([*args, "--batch_size", "4"]) == 0
    assert (tmp_path / "one" / "score").read_text() == (decoded / "score").read_text()
    assert len((tmp_path / "two" / "text").read_text().splitlines()) == 6
    capsys.readouterr()
    assert main([*args, "--batch_size", "4"]) == 0
    assert capsys.readouterr().out.count("already decoded") == 2
    with pytest.raises(ConfigError, match="--data names 2 directories, --out 1 and"):
        main([*args[:5], "--out", outs[0], *args[8:]])


def test_a_missing_shard_is_not_merged(exp: Path, data: Path, tmp_path: Path) -> None:
    decode(exp, data, tmp_path, "--shard", "1/2")
    with pytest.raises(DataError, match="did not finish"):
        decode(exp, data, tmp_path, "--shard", "1/2", "--merge")


def test_a_killed_run_continues_after_the_last_whole_line(decoded: Path, exp: Path, data: Path, tmp_path: Path) -> None:
    decode(exp, data, tmp_path)
    journal = tmp_path / "split1" / "1" / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:5]) + lines[5][:20])
    (tmp_path / "stats.json").unlink()
    decode(exp, data, tmp_path)
    again = journal.read_text().splitlines(keepends=True)
    assert again[:4] == lines[:4]  # the first batch of four was whole; the second is decoded again
    assert (tmp_path / "text").read_text() == (decoded / "text").read_text()
    assert (tmp_path / "score").read_text() == (decoded / "score").read_text()


def test_silence_changes_the_answers_and_the_passport_says_so(exp: Path, data: Path, tmp_path: Path) -> None:
    on, off = tmp_path / "on", tmp_path / "off"
    decode(exp, data, on, "--audio_off", str(off))
    assert read_json(off / "stats.json")["audio"] == "zero"
    assert (on / "score").read_text() != (off / "score").read_text()


def test_another_checkpoint_or_option_does_not_mix_in(exp: Path, data: Path, tmp_path: Path) -> None:
    decode(exp, data, tmp_path, "--limit", "2")
    assert decode(exp, data, tmp_path, "--limit", "2") == 0  # complete: returns at once
    with pytest.raises(DataError, match="limit"):
        decode(exp, data, tmp_path)


def test_errors_say_what_to_do(exp: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2/8"):
        decode(exp, data, tmp_path / "a", "--shard", "two")
    (tmp_path / "bad.yaml").write_text("beams: 3\n")
    with pytest.raises(ConfigError, match="beams"):
        main(["--exp", str(exp), "--data", str(data), "--out", str(tmp_path), "--config", str(tmp_path / "bad.yaml")])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises((CheckpointError, ConfigError), match=r"stage 3|config"):
        decode(empty, data, tmp_path / "b")
    for wrong in ({"audio": "loud"}, {"shard": 3, "shards": 2}):
        with pytest.raises(ConfigError):
            DecodeOptions(**wrong)


def test_shards_cover_everything_once() -> None:
    keys = [f"u{i}" for i in range(17)]
    seconds = {key: float(i % 5) for i, key in enumerate(keys)}
    parts = [shard_keys(keys, seconds, shard, 4) for shard in range(1, 5)]
    assert sorted(key for part in parts for key in part) == sorted(keys)


def test_answers_keep_to_their_constraints(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    write_exp(tmp_path, tiny_llm_dir, ctc=True)
    options = {
        "beam_size": 2, "nbest": 2, "max_new_tokens": 20, "no_repeat_ngram": 1, "tokens_per_second": 2.0,
        "answer_sets": {"count": ["0", "1"]}, "task_vocabulary": True,
    }  # fmt: skip
    write_config(options, tmp_path / "decode.yaml")
    assert decode(tmp_path, data, tmp_path / "out") == 0
    fired: dict[str, int] = {}
    for line in (tmp_path / "out" / "nbest.jsonl").read_text().splitlines():
        entry = json.loads(line)
        for name, times in entry["constraints"].items():
            fired[name] = fired.get(name, 0) + times
        best = entry["hypotheses"][0]
        assert len(set(best["tokens"])) == len(best["tokens"])
        assert len(best["tokens"]) <= 8 + 2 * entry["seconds_audio"] + 1
        if entry["task"] == "count":
            assert [one["text"] in ("0", "1") for one in entry["hypotheses"]] == [True, True]
            chances = entry["answer_log_probs"]
            assert list(chances) == ["0", "1"] and sum(map(math.exp, chances.values())) <= 1.0
        else:
            assert "answer_log_probs" not in entry
            assert all(3 <= token < 250 for token in best["tokens"][:-1])
    assert read_json(tmp_path / "out" / "stats.json")["constraints"] == fired
    assert {"answer_set", "length_cap"} <= set(fired)


@pytest.mark.parametrize("vocabulary", [False, True])
def test_drafts_change_no_answer_and_are_counted(
    data: Path, tiny_llm_dir: Path, tmp_path: Path, vocabulary: bool
) -> None:
    losses = {"asr": "ctc", "caption": "bag", "count": "bag"}
    write_exp(tmp_path, tiny_llm_dir, ctc=True, warm_start_conf={"losses": losses})
    entries = {}
    for kind in ("none", "ctc"):
        draft = {"kind": kind, "most": 5}
        options = {"beam_size": 1, "max_new_tokens": 16, "task_vocabulary": vocabulary, "draft": draft}
        write_config(options, tmp_path / "decode.yaml")
        assert decode(tmp_path, data, tmp_path / kind) == 0
        lines = (tmp_path / kind / "nbest.jsonl").read_text().splitlines()
        entries[kind] = [json.loads(line) for line in lines]
        drafts: dict[str, dict[str, int]] = {}
        for entry, plain in zip(entries[kind], entries["none"], strict=True):
            assert entry["hypotheses"][0]["tokens"] == plain["hypotheses"][0]["tokens"]
            if kind == "none":
                assert "draft" not in entry
                continue
            assert entry["draft"]["drafter"] == ("ctc" if entry["task"] == "asr" else "none")
            assert entry["draft"]["passes"] + entry["draft"]["accepted"] == len(entry["hypotheses"][0]["tokens"])
            found = drafts.setdefault(entry["draft"]["drafter"], {"utterances": 0, "tokens": 0})
            found["utterances"] += 1
            found["tokens"] += len(entry["hypotheses"][0]["tokens"])
            for name in ("proposed", "accepted", "passes"):
                found[name] = found.get(name, 0) + entry["draft"][name]
        assert read_json(tmp_path / kind / "stats.json").get("drafts", {}) == drafts
    assert sum(entry["draft"]["proposed"] for entry in entries["ctc"]) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_repeat_ngram": -1}, "no_repeat_ngram"),
        ({"no_repeat_ngram": 2.5}, "no_repeat_ngram"),
        ({"tokens_per_second": float("nan")}, "tokens_per_second"),
        ({"task_vocabulary": "nope"}, "task_vocabulary"),
        ({"beam_size": 4.0}, "beam_size"),
        ({"eos_ids": [2]}, "end tokens"),
        ({"answer_sets": ["count"]}, "answer_sets"),
        ({"answer_sets": {"count": "01234"}}, "answer_sets.count"),
        ({"answer_sets": {"count": [0, 1]}}, "answer_sets.count"),
        ({"answer_sets": {"count": ["0"]}, "min_new_tokens": 3}, "min_new_tokens"),
        ({"answer_sets": {"count": ["zero point one two three four"]}, "max_new_tokens": 2}, "max_new_tokens"),
        ({"exit": [3]}, "decode.yaml"),
        ({"draft": [3]}, "decode.yaml"),
        ({"draft": {"kind": "exit"}}, "draft.kind"),
        ({"draft": {"kind": "ctc"}}, "beam_size"),
        ({"beam_size": 1, "draft": {"kind": "ctc"}}, "warm start"),
        ({"beam_size": 1, "draft": {"kind": "ctc"}, "exit": {"mode": "fixed", "layers": [1]}}, "exit.mode"),
        ({"answer_sets": {"count": []}}, "answer_sets.count"),
        ({"answer_sets": {"counting": ["1"]}}, "counting"),
        ({"task_vocabulary": True}, "task_vocabulary"),
    ],
)
def test_options_of_decoding_that_cannot_be(
    exp: Path, data: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    write_config(options, tmp_path / "decode.yaml")
    with pytest.raises(ConfigError, match=message):
        main([
            "--exp", str(exp), "--data", str(data), "--out", str(tmp_path / "out"),
            "--config", str(tmp_path / "decode.yaml"),
        ])  # fmt: skip
