"""The multitask recipe on the synthetic corpora of the three recipes that it calls, with tiny random models."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from audiocaps_corpus import write_audio, write_release
from libri_corpora import copy_recipe, make_libricount, make_librispeech, run
from packed_answers import check_archive
from processes import TRAINING, check_same, train

from pam_espnet.data.batching import BatchingOptions, plan_pass
from pam_espnet.data.datadir import DataDir
from pam_espnet.data.leakage import MIX_SOURCES, MIX_SPEAKERS
from pam_espnet.data.passport import Passport
from pam_espnet.data.tables import read_table, write_table
from pam_espnet.fileio import read_trained

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "egs" / "multitask" / "pam1"
READERS = {"train-clean-5": 11, "dev-clean-2": 10, "test-clean": 1, "test-other": 1}  # 61-71, 72-81, 82, 83
TESTS = {
    "test_clean": {"asr": 2},
    "test_other": {"asr": 2},
    "test_count": {"count": 11},
    "test_verify": {"verify": 11},
    "test_caption": {"caption": 3},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A copy of the recipes, two wordings of each question, after stages 1 and 2 on them."""
    root = tmp_path_factory.mktemp("multitask")
    make_librispeech(root / "corpora", READERS, utterances=2)
    make_libricount(root / "corpora", each=1, readers=(82,) * 10)
    write_release(root / "csv")
    write_audio(root / "clips")
    recipe = copy_recipe(root / "tree", "multitask", "librispeech", "libricount", "audiocaps")
    for path in (root / "tree").glob("egs/*/pam1/conf/prompts/*.txt"):
        wordings = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        path.write_text("\n".join(wordings[:2]) + "\n")
    sizes = root / "tree/egs/libricount/pam1/local/sizes.yaml"
    small = yaml.safe_load(sizes.read_text())
    small["mini"]["clips"] = {"train": 1, "dev": 1}
    sizes.write_text(yaml.safe_dump(small))
    corpora = root / "corpora"
    options = ["--size", "mini", "--nj", "1", "--check_counts", "false", "--librispeech", str(corpora)]
    options += ["--libricount", str(corpora), "--csv", "../../../../csv", "--audio", str(root / "clips")]
    done = run(recipe, *options, "--stop_stage", "2")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return SimpleNamespace(recipe=recipe, options=options, output=done.stdout)


# ---- data -----------------------------------------------------------------------------------------------------------


def test_sets_of_three_corpora(made: SimpleNamespace) -> None:
    data = made.recipe / "data/mini"
    train = DataDir.load(data / "train")
    assert train.per_task() == {"asr": 22, "count": 11, "caption": 4, "verify": 11}
    assert DataDir.load(data / "dev").per_task() == {"asr": 20, "count": 11, "caption": 2, "verify": 11}
    for name, tasks in TESTS.items():
        assert DataDir.load(made.recipe / "dump/mini/raw" / name).per_task() == tasks
    for task in ("asr", "count", "verify"):  # four captions may well be asked for alike
        asked = {train.prompt[utt] for utt in train.utterances if train.utt2task[utt] == task}
        assert len(asked) > 1, task
    # whose voices are in the mixtures, and which clips are missing, is still known
    for name in (MIX_SPEAKERS, MIX_SOURCES):
        assert len(read_table(data / "train" / name, allow_empty=True)) == 22
    assert list(read_table(data / "test_caption/missing")) == ["Ycccccccccc4_30"]
    assert list(Passport.load(made.recipe / "dump/mini/raw/test_caption").skipped) == ["Ycccccccccc4_30"]
    assert "train: none of the 2 readers of the test sets" in made.output


def test_the_files_of_prompts_are_those_of_the_other_recipes() -> None:
    corpora = {"asr": "librispeech", "count": "libricount", "verify": "libricount", "caption": "audiocaps"}
    for task, corpus in corpora.items():
        own = RECIPE / "conf/prompts" / f"{task}.txt"
        assert own.resolve() == (ROOT / "egs" / corpus / "pam1/conf/prompts" / f"{task}.txt").resolve()


def test_options_are_those_of_the_other_recipes() -> None:
    usage = run(RECIPE, "--help").stdout
    for option in ("--captions", "--librispeech", "--libricount", "--audio", "--fetch_interval", "--check_counts"):
        assert usage.count(f"  {option} ") == 1
    assert "--folds" not in usage and run(RECIPE, "--folds", "true").returncode == 1


def test_an_utterance_or_a_speaker_of_a_test_set_stops_the_training(made: SimpleNamespace) -> None:
    """Through stage 3, with a training set that nobody checked when it was made."""
    data = made.recipe / "data/mini"
    train = DataDir.load(data / "train")
    tests = " ".join(TESTS)
    check = [str(made.recipe / "local/check_train.py"), "--train", "data/mini/train", "--tests"]
    assert run(made.recipe, *check, *(f"data/mini/{name}" for name in TESTS), program=sys.executable).returncode == 0

    train.save(data / "spoiled")
    for name in (MIX_SPEAKERS, MIX_SOURCES):
        table = read_table(data / "train" / name, allow_empty=True)
        write_table(data / "spoiled" / name, {**table, "count-mix-train-000005": "82" if name == MIX_SPEAKERS else ""})
    stage = ["--stage", "3", "--stop_stage", "3", "--train_set", "spoiled", "--test_sets"]
    refused = run(made.recipe, *made.options, *stage, tests)
    assert refused.returncode == 1 and "count-mix-train-000005: speaker 82 of test_clean" in refused.stderr
    # where nothing of LibriSpeech's is scored, the same set may be trained on: stage 3 continues to the next error
    allowed = run(made.recipe, *made.options, *stage, "test_caption")
    assert "speaker 82" not in allowed.stderr and "there is no dump/mini/raw/spoiled" in allowed.stderr

    test = DataDir.load(data / "test_other")
    utterance = test.utterances[0]
    for name in ("wav", "text", "prompt", "utt2task", "utt2spk"):
        getattr(train, name)[utterance] = getattr(test, name)[utterance]
    train.utt2spk[utterance] = "somebody"
    train.save(data / "spoiled")
    refused = run(made.recipe, *made.options, *stage, "test_other")
    assert refused.returncode == 1 and f"1 of its utterances are in data/mini/test_other: {utterance}" in refused.stderr


# ---- training, selection, every wording ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.services  # minutes
def test_stages_3_to_6(made: SimpleNamespace, tiny_llm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs of two steps: all that is tested is that every part finds its input and reports its output."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests/kit'}")  # tiny_encoder
    recipe, tests = made.recipe, {"test_clean", "test_verify", "test_caption"}
    small = {
        "llm": str(tiny_llm_dir),
        "llm_conf": {
            "dtype": "float32",
            "gradient_checkpointing": False,
            "lora": {"r": 4, "target_modules": ["q_proj"]},
        },
        "frontend_conf": {
            "encoders": {
                "whisper": {"type": "tiny_encoder:TinyEncoder", "path": "", "layers": [0, 1], "long_clips": None},
                "wavlm": {"type": "tiny_encoder:TinyEncoder", "path": "", "layers": [0, 1]},
                "wav2vec2": {"type": "tiny_encoder:TinyEncoder", "path": "", "layers": [0, 1]},
            }
        },
        "warm_start_conf": {"steps": 4, "single_steps": 2, "max_utterances": 4},
        "batching_conf": {"max_utterances": 8},
        "max_epoch": 2,
        "num_iters_per_epoch": 2,
    }
    (recipe / "conf/small.yaml").write_text(yaml.safe_dump(small))
    decode = yaml.safe_load((recipe / "conf/decode.yaml").read_text()) | {"beam_size": 2, "max_new_tokens": 6}
    (recipe / "conf/decode_small.yaml").write_text(yaml.safe_dump(decode))
    done = run(
        recipe, *made.options, "--stage", "3", "--stop_stage", "6", "--tag", "small",
        "--audio_off", "false", "--all_prompts", "true", "--train_nj", "2",
        "--train_config", "conf/train.yaml conf/small.yaml", "--decode_config", "conf/decode_small.yaml",
        "--set", "num_workers=0 max_epoch=2 num_iters_per_epoch=2", "--test_sets", " ".join(sorted(tests)),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    exp = recipe / "exp/small"

    log = (exp / "log/train.log").read_text()
    assert "how often a pass shows an utterance of each task: {'asr': '1.39', 'caption': '1.63'" in log
    for epoch in (1, 2):
        assert f"epoch {epoch}, utterances per task: asr " in log
    selection = json.loads((exp / "selection.json").read_text())
    assert [entry["epoch"] for entry in selection["epochs"]] == [1, 2]
    for entry in selection["epochs"]:
        assert set(entry["tasks"]) == {"asr", "count", "caption", "verify"} and entry["loss_answer"] > 0
    state = read_trained(exp / "model.safetensors")
    chosen = read_trained(exp / "select" / f"{selection['selected']}epoch/model.safetensors")
    assert all((state[name] == chosen[name]).all() for name in chosen) and state.keys() == chosen.keys()
    assert f"| **{selection['selected']}** |" in (exp / "SELECTION.md").read_text()

    results = json.loads((exp / "results.json").read_text())
    assert {decoding["set"] for decoding in results["decodings"]} == tests
    spreads = {entry["set"]: entry for entry in results["wordings"]}
    assert set(spreads) == tests
    for entry in spreads.values():
        first, second = entry["wordings"]
        assert (first["number"], second["number"]) == (1, 2) and first["example"] != second["example"]
        assert entry["min"] <= entry["mean"] <= entry["max"]
    report = (exp / "RESULTS.md").read_text()
    assert "## Wordings of the question" in report and f"that of epoch {selection['selected']}" in report
    assert "- beam, test_caption: 3 of 4 scored (1 missing)" in report

    monkeypatch.chdir(recipe)
    decoded, data = exp / "decode_beam/test_verify", recipe / "dump/mini/raw/test_verify"
    check_archive(exp / "small.zip", decoded, data, {"llm": tiny_llm_dir})


@pytest.mark.slow
def test_two_processes_train_what_one_does(
    made: SimpleNamespace, tiny_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the recipe's sampling and prompts, in batches of four: a rank always lacks two of the four tasks."""
    monkeypatch.chdir(made.recipe)  # paths of prompts and audio start there
    (tmp_path / "dump").symlink_to(made.recipe / "dump/mini/raw")
    conf = yaml.safe_load(Path("conf/train.yaml").read_text())
    options = {
        "batching_conf": {**conf["batching_conf"], "max_utterances": 4, "limits": "global"},
        "prompt_files": conf["prompt_files"],
        "model_conf": {"extract_feats_in_collect_stats": False, "router_loss_weight": 0.1},
    }
    tables = [read_table(tmp_path / "dump/train" / name) for name in ("utt2num_samples", "utt2task")]
    seconds = {utt: int(samples) / 16000 for utt, samples in tables[0].items()}
    plans = [
        plan_pass(seconds, tables[1], BatchingOptions(**options["batching_conf"]), TRAINING["seed"], 0, ranks)
        for ranks in (1, 2)
    ]
    assert plans[0] == plans[1]  # no batch of one utterance, which two ranks could not share
    two = train(tmp_path, tiny_llm_dir, tmp_path / "two", 2, **options)
    check_same(train(tmp_path, tiny_llm_dir, tmp_path / "one", 1, **options), two)
    tasks = {f"loss_{task}" for task in ("asr", "count", "caption", "verify")}
    assert all(tasks <= set(entry) for entry in two[1] if entry["split"] == "valid")
