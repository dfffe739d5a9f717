"""Model cards: metadata that huggingface_hub reads back, what a reader needs to know, what a recipe may state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from pam_espnet.config import write_config
from pam_espnet.errors import ConfigError
from pam_espnet.fileio import write_json
from pam_espnet.hub.card import model_card, read_facts

COMMIT, DIGEST = "0123456789abcdef0123456789abcdef01234567", "ab" * 32
LOCAL = {
    "name": "yamnet",
    "source": "downloads/yamnet",
    "revision": None,
    "licence": "apache-2.0",
    "files": {"config.json": "00", "model.safetensors": DIGEST},
    "get": "in egs/mini/pam1: ./run.sh --stage 1",
}
HOSTED = {
    "name": "llm",
    "source": "org/llm",
    "revision": COMMIT,
    "licence": None,
    "files": {"model.safetensors": DIGEST},
    "get": "loading fetches it",
}
FACTS = {"languages": ["en"], "license": "other", "trained_on": "Tones and lines.", "speech": ["read", "acted"]}


def decoding(name: str, test_set: str, task: str, **metrics: tuple[float | None, ...]) -> dict[str, Any]:
    """An entry of results.json, metric=(value, low, high)."""
    keys = ("value", "low", "high")
    made = {key: {**dict(zip(keys, given, strict=True)), "n": 70} for key, given in metrics.items()}
    audio = "zero" if "off" in name else "on"
    fixed = {"bootstrap": {"level": 0.95}, "commit": "d298865"}
    return {"decode": name, "set": test_set, "audio": audio, "tasks": {task: made}, **fixed}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """What a card is made from."""
    made = [
        decoding("beam", "test_asr", "asr", wer=(49.00285, 39.1297, 58.784), cer=(20.0, 19.0, 21.0)),
        decoding("beam", "test_caption", "caption", cider_d=(0.5674, 0.376, 0.765), spice=(None, None, None)),
        decoding("beam", "test_count", "count", accuracy=(81.0, 73.0, 88.0), mae=(0.19, None, None)),
        decoding("beam_audio_off", "test_asr", "asr", wer=(107.98, 104.2, 114.7)),
        decoding("greedy", "test_asr", "asr", wer=(60.0, 50.0, 70.0)),
    ]
    manifest = {"experiment": "pam_quick", "versions": {"pam_espnet": "0.2.0"}, "decoding": {"name": "beam"}}
    write_json(tmp_path / "manifest.json", {**manifest, "models": [HOSTED, LOCAL]})
    write_json(tmp_path / "results.json", {"decodings": made})
    write_config(FACTS, tmp_path / "card.yaml")
    (tmp_path / "routing.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_metadata_is_read_back(package: Path) -> None:
    data = ModelCard(model_card(package, "me/mine")).data
    assert (data.language, data.license, data.library_name) == (["en"], "other", "pam-espnet")
    assert data.license_link == "https://huggingface.co/me/mine/tree/main/licences" and data.license_name
    assert data.base_model == ["org/llm"] and data.model_name == "pam_quick"
    found = [(one.dataset_name, one.metric_type, one.metric_value, one.metric_name) for one in data.eval_results or []]
    assert found == [
        ("test_asr", "wer", 49.0, "WER % (95% interval 39.1 to 58.8, 70 utterances)"),
        ("test_caption", "cider_d", 0.567, "CIDEr-D (95% interval 0.376 to 0.765, 70 utterances)"),
        ("test_count", "accuracy", 81.0, "accuracy % (95% interval 73.0 to 88.0, 70 utterances)"),
        ("test_count", "mae", 0.19, "MAE"),
    ]
    tasks = {one.task_type for one in data.eval_results or []}
    assert tasks == {"automatic-speech-recognition", "audio-text-to-text", "audio-classification"}


def test_text(package: Path) -> None:
    text = ModelCard(model_card(package, "me/mine")).text
    assert "**Trained on acted speech.**" in text and "Tones and lines." in text and "read, acted" in text
    assert "| test_asr | asr | on | WER % ↓ | 49.0 [39.1, 58.8] | 70 |" in text
    assert "| test_asr | asr | zero | WER % ↓ | 108.0 [104.2, 114.7] | 70 |" in text and "60.0" not in text
    assert "![Weights of encoders and layers](routing.png)" in text and "commit d298865" in text
    assert (
        f"| llm | [org/llm](https://huggingface.co/org/llm/tree/{COMMIT}) | commit `{COMMIT}` | not known here |"
        in text
    )
    assert f"| yamnet | `downloads/yamnet` | model.safetensors: SHA-256 `{DIGEST}` | apache-2.0 |" in text
    assert "--model me/mine --models yamnet=DIR clip.wav --prompt" in text
    assert 'print(*(part.text for part in model.transcribe("clip.wav", task="asr")))' in text
    assert 'pam_espnet.load("me/mine", models={"yamnet": "DIR"})' in text and "./run.sh --stage 1" in text


def test_a_model_that_travels_needs_no_folder(package: Path) -> None:
    (package / "models/yamnet").mkdir(parents=True)
    text = model_card(package, "me/mine")
    assert "--model me/mine clip.wav" in text and 'load("me/mine")' in text
    assert "| yamnet | [here](models/yamnet), from `downloads/yamnet` |" in text


def test_nothing_is_claimed_that_is_not_known(package: Path) -> None:
    (package / "card.yaml").unlink()
    (package / "routing.png").unlink()
    write_json(package / "results.json", {})
    card = ModelCard(model_card(package, "me/mine"))
    assert card.data.license == "unknown" and card.data.eval_results is None and card.data.language is None
    assert "Not stated by who packed it." in card.text and "is not stated" in card.text
    assert "Scores" not in card.text and "routing" not in card.text and "Trained on" not in card.text
    write_config({"speech": []}, package / "card.yaml")
    assert "acted" not in model_card(package, "me/mine")
    write_config({"speech": ["synthetic", "acted"]}, package / "card.yaml")
    assert "**Trained on acted and synthetic speech.**" in model_card(package, "me/mine")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"licence": "mit"}, "unknown key 'licence'; there are languages, speech, datasets, license, trained_on"),
        ({"languages": "en"}, r"languages must be a list, such as \[en\], got 'en'"),
        ({"trained_on": ["x"]}, "trained_on must be a text"),
        ({"speech": ["acting"]}, "unknown 'acting'; there are read, spontaneous, acted, synthetic"),
    ],
)
def test_a_card_that_cannot_be_read(tmp_path: Path, facts: dict[str, Any], message: str) -> None:
    write_config(facts, tmp_path / "card.yaml")
    with pytest.raises(ConfigError, match=f"conf/card.yaml: .*{message}"):
        read_facts(tmp_path)


def test_the_recipes_state_what_they_were_trained_on(repo_root: Path) -> None:
    for name in ("audiocaps", "libricount", "librispeech", "mini", "multitask"):
        facts = read_facts(repo_root / f"egs/{name}/pam1/conf")
        assert facts["trained_on"] and facts["languages"] == ["en"] and "speech" in facts
    assert "acted" in read_facts(repo_root / "egs/mini/pam1/conf")["speech"]


def test_what_a_user_may_state_of_own_data(repo_root: Path, tmp_path: Path) -> None:
    """The file is an example; it can be read as it is, and with its marks taken away."""
    text = (repo_root / "egs/own/pam1/conf/card.yaml").read_text()
    assert read_facts(repo_root / "egs/own/pam1/conf") == {}
    stated = [
        line.removeprefix("# ") for line in text.splitlines() if line.partition(":")[0].lstrip("# ").isidentifier()
    ]
    (tmp_path / "card.yaml").write_text("\n".join(stated))
    assert len(read_facts(tmp_path)) == 5
