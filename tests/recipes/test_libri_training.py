"""librispeech and libricount through all stages: synthetic corpora, the mini recipe's real encoders and a tiny LLM.

What is trained in two steps is worth nothing; what is tested is that the stages fit these recipes' data and options
(waveforms instead of cached states, two test sets, the task verify).
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from libri_corpora import copy_recipe, make_libricount, make_librispeech, run, small
from packed_answers import check_archive

from pam_espnet.data.tables import read_table

pytestmark = [pytest.mark.slow, pytest.mark.services]  # minutes


def scores(recipe: Path, name: str) -> dict:
    return json.loads((recipe / "exp/small/decode_beam" / name / "scores.json").read_text())


def check_packed(recipe: Path, models: Path, llm: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive, given the folders of its models, answers as the set was decoded."""
    monkeypatch.chdir(recipe)  # paths in dump/ start here
    folders = {"whisper": "whisper-tiny.en", "wavlm": "pyannote-segmentation", "wav2vec2": "yamnet"}
    placed = {"llm": llm, **{part: models / folder for part, folder in folders.items()}}
    decoded, data = recipe / "exp/small/decode_beam" / name, recipe / "dump/mini/raw" / name
    check_archive(recipe / "exp/small/small.zip", decoded, data, placed)


def test_librispeech(tmp_path: Path, mini_models: Path, tiny_llm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_librispeech(
        tmp_path, {"train-clean-5": 3, "dev-clean-2": 1, "test-clean": 1, "test-other": 1}, utterances=2
    )
    recipe = copy_recipe(tmp_path / "bob's own tree", "librispeech")  # a path that a shell would take apart
    done = run(recipe, *small(recipe, mini_models, tiny_llm_dir), "--librispeech", str(corpus), "--stop_stage", "6")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in ("test_clean", "test_other"):
        assert scores(recipe, name)["tasks"]["asr"]["wer"]["n"] == 2
    assert "test_other" in (recipe / "exp/small/RESULTS.md").read_text()
    assert not (recipe / "dump/mini/feats").exists()
    check_packed(recipe, mini_models, tiny_llm_dir, "test_other", monkeypatch)


def test_libricount(tmp_path: Path, mini_models: Path, tiny_llm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_librispeech(tmp_path, {"train-clean-5": 11, "dev-clean-2": 10}, utterances=2, named=("test-clean",))
    make_libricount(tmp_path, each=1)
    recipe = copy_recipe(tmp_path / "tree", "libricount")
    sizes = yaml.safe_load((recipe / "local/sizes.yaml").read_text())
    sizes["mini"]["clips"] = {"train": 1, "dev": 1}
    (recipe / "local/sizes.yaml").write_text(yaml.safe_dump(sizes))
    options = [*small(recipe, mini_models, tiny_llm_dir), "--librispeech", str(tmp_path), "--libricount", str(tmp_path)]
    done = run(recipe, *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert set(scores(recipe, "test_count")["tasks"]) == {"count"}
    verify = scores(recipe, "test_verify")
    assert verify["tasks"]["verify"]["accuracy"]["n"] == 11 and "no_answer" in verify["details"]["verify"]

    # the closed question: nothing but yes and no is answered
    decode = yaml.safe_load((recipe / "conf/decode_small.yaml").read_text())
    decode["answer_sets"] = {"count": [str(number) for number in range(11)], "verify": ["yes", "no"]}
    (recipe / "conf/decode_small.yaml").write_text(yaml.safe_dump(decode))
    shutil.rmtree(recipe / "exp/small/decode_beam")
    closed = run(recipe, *options, "--stage", "4", "--stop_stage", "6", "--test_sets", "test_verify")
    assert closed.returncode == 0, closed.stdout[-3000:] + closed.stderr[-3000:]
    answers = read_table(recipe / "exp/small/decode_beam/test_verify/text")
    assert set(answers.values()) <= {"yes", "no"}
    assert scores(recipe, "test_verify")["details"]["verify"]["no_answer"] == 0
    check_packed(recipe, mini_models, tiny_llm_dir, "test_verify", monkeypatch)
