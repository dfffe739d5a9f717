"""Metrics that need more than this package: with replacements of their programs and models, and without them.

METEOR's real program is used where it is installed (tools/parts); its counts and scores are fixed in the JSON file.
"""

import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from services import unavailable

from pam_espnet.score.captions import score_captions, tokenize
from pam_espnet.score.intervals import value_of
from pam_espnet.score.meteor import Meteor, meteor
from pam_espnet.score.parts import UnavailableError, find_java
from pam_espnet.score.result import statistics_of
from pam_espnet.score.spice import spice

FIXED = json.loads((Path(__file__).parent / "captions_reference.json").read_text(encoding="utf-8"))
UTTERANCES = FIXED["utterances"]
REFERENCES = {key: entry["references"] for key, entry in UTTERANCES.items()}
HYPOTHESES = {key: entry["hypothesis"] for key, entry in UTTERANCES.items()}
COUNTS = np.array([[float(word) for word in entry["meteor_counts"].split()] for entry in UTTERANCES.values()])

# A Java runtime that plays METEOR (answers a line of counts per SCORE line) or SPICE (writes scores), by its arguments.
JAVA = """#!{python}
import json, sys
if "meteor-1.5.jar" in sys.argv:
    counts = json.load(open({counts!r}))
    for line in sys.stdin:
        words = line.rstrip("\\n").split(" ||| ")
        assert words[0] == "SCORE" and len(words) == 7, words
        print(counts[words[-1]])
else:
    jar = sys.argv.index("spice-1.0.jar")
    entries = json.load(open(sys.argv[jar + 1]))
    nan = float("nan")
    scores = [{{"image_id": e["image_id"], "scores": {{"All": {{"f": 0.5 if e["test"] else nan}}}}}} for e in entries]
    json.dump(scores[::-1], open(sys.argv[sys.argv.index("-out") + 1], "w"))
"""


def tokens() -> tuple[list[list[str]], list[list[list[str]]]]:
    given = [tokenize(text) for text in HYPOTHESES.values()]
    return given, [[tokenize(text) for text in several] for several in REFERENCES.values()]


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of parts, and no Java on PATH."""
    monkeypatch.setenv("PAM_PARTS", str(tmp_path / "parts"))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    return tmp_path / "parts"


@pytest.fixture
def java(parts: Path, tmp_path: Path) -> Path:
    """Replacements of the runtime and both programs."""
    counts = tmp_path / "counts.json"
    counts.write_text(
        json.dumps({" ".join(tokenize(e["hypothesis"])): e["meteor_counts"] for e in UTTERANCES.values()})
    )
    program = parts / "java" / "bin" / "java"
    program.parent.mkdir(parents=True)
    program.write_text(JAVA.format(python=sys.executable, counts=str(counts)))
    program.chmod(0o755)
    for name in ("meteor/meteor-1.5.jar", "spice/spice-1.0.jar", "spice/lib/stanford-corenlp-3.6.0-models.jar"):
        (parts / name).parent.mkdir(parents=True, exist_ok=True)
        (parts / name).touch()
    return program


def test_meteor_of_its_counts() -> None:
    """Each utterance and the corpus as METEOR's own program scores them, to its last digits."""
    found = Meteor.of(COUNTS)
    measured = [entry["meteor"] for entry in UTTERANCES.values()]
    assert found.figures(found.table).tolist() == pytest.approx(measured, abs=1e-12)
    assert value_of(found) == pytest.approx(FIXED["corpus"]["meteor"], abs=1e-12)
    assert value_of(statistics_of("meteor", found.table)) == value_of(found)  # as read back from a file


@pytest.mark.services
def test_meteor_with_the_real_program(installed_parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAM_PARTS", str(installed_parts))
    if not (installed_parts / "meteor").is_dir():
        unavailable("meteor", "METEOR is not installed: tools/installers/caption_metrics.py meteor")
    try:
        find_java()
    except UnavailableError as error:
        unavailable("meteor", str(error))
    assert meteor(*tokens()).table.tolist() == Meteor.of(COUNTS).table.tolist()


def test_everything_that_is_installed_is_computed(java: Path) -> None:
    result = score_captions(REFERENCES, HYPOTHESES)
    assert value_of(result.metrics["meteor"]) == pytest.approx(FIXED["corpus"]["meteor"], abs=1e-12)
    assert value_of(result.metrics["spice"]) == pytest.approx(0.5 * 5 / 6)  # the empty caption's is undefined: 0
    cider = FIXED["corpus"]["cider_d"]
    assert value_of(result.metrics["spider"]) == pytest.approx((cider + 0.5 * 5 / 6) / 2)
    assert list(result.details["not_computed"]) == ["fense"]


def test_what_is_not_installed_is_named_with_what_to_type(parts: Path) -> None:
    result = score_captions(REFERENCES, HYPOTHESES)
    absent = result.details["not_computed"]
    assert list(absent) == ["meteor", "spice", "spider", "fense"]
    for name in ("meteor", "spice", "fense"):
        assert f"tools/installers/caption_metrics.py {name}" in absent[name]
    assert {"cider_d", "rouge_l", "bleu_4"} <= set(result.metrics)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("#!/bin/sh\necho 'Exception in thread main' >&2\nexit 1\n", "Exception in thread main"),
        ("#!/bin/sh\necho 1 2 3\n", "1 lines of counts for 6 captions"),
        ("#!/bin/sh\necho what\n", "what"),
        ("#!/no/such/interpreter\n", "cannot be started"),
    ],
)
def test_a_broken_program_costs_one_metric(java: Path, program: str, reason: str) -> None:
    java.write_text(program)
    absent = score_captions(REFERENCES, HYPOTHESES).details["not_computed"]
    assert reason in absent["meteor"] and "spice" in absent


def test_no_java(java: Path) -> None:
    java.unlink()
    absent = score_captions(REFERENCES, HYPOTHESES).details["not_computed"]
    assert "no Java runtime" in absent["meteor"] and "caption_metrics.py java" in absent["spice"]


def test_spice_needs_corenlp(java: Path, parts: Path) -> None:
    (parts / "spice/lib/stanford-corenlp-3.6.0-models.jar").unlink()
    with pytest.raises(UnavailableError, match=r"caption_metrics\.py spice"):
        spice(*tokens())


# ---- FENSE and the installer ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of width 16 and a tokenizer that knows the words of the fixed captions."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word for entry in UTTERANCES.values() for text in entry["references"] for word in text.split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(words) + 5, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        model = BertModel(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def install(repo_root: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repo_root / "tools/installers/caption_metrics.py"), *args]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def fense_parts(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    """FENSE installed from a replacement of the published checkpoint."""
    import torch
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("fense")
    model = BertModel.from_pretrained(tiny_bert)
    state = {f"encoder.{name}": value for name, value in model.state_dict().items()}
    state["encoder.embeddings.position_ids"] = torch.arange(512)[None]  # as in checkpoints of its time
    state["clf.weight"], state["clf.bias"] = torch.zeros(6, 16), torch.zeros(6)
    state["clf.weight"][5, 0] = 30.0
    checkpoint = folder / "echecker.ckpt"
    torch.save({"model_type": str(tiny_bert), "num_classes": 6, "state_dict": state}, checkpoint)
    with pytest.MonkeyPatch.context() as patch:  # in this process, which has imported transformers already
        patch.setenv("PAM_PARTS", str(folder / "parts"))
        words = ["fense", "--sentences", str(tiny_bert), "--detector", str(checkpoint)]
        patch.setattr(sys, "argv", ["caption_metrics.py", *words])
        tool = runpy.run_path(str(repo_root / "tools/installers/caption_metrics.py"), run_name="installer")
        assert tool["main"]() == 0
    return folder / "parts"


def test_fense(fense_parts: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain computation, one sentence at a time."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    monkeypatch.setenv("PAM_PARTS", str(fense_parts))
    result = score_captions(REFERENCES, HYPOTHESES)
    assert "fense" not in result.details["not_computed"]
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_bert), AutoModel.from_pretrained(tiny_bert).eval()

    @torch.no_grad()
    def mean_vector(text: str) -> Any:
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        return torch.nn.functional.normalize(hidden.mean(0), dim=0)

    expected, broken = [], []
    for key, several in REFERENCES.items():
        own = mean_vector(HYPOTHESES[key])
        similarity = sum(float(own @ mean_vector(text)) for text in several) / len(several)
        with torch.no_grad():
            batch = tokenizer(HYPOTHESES[key], padding="max_length", max_length=64, return_tensors="pt")
            first = model(**batch).last_hidden_state[0, 0, 0]
        broken.append(bool(torch.sigmoid(30.0 * first) > 0.9))
        expected.append(similarity * (0.1 if broken[-1] else 1.0))
    assert set(broken) == {True, False}  # or one branch is not tested
    assert result.metrics["fense"].table[:, 0].tolist() == pytest.approx(expected, abs=1e-4)


def test_models_that_cannot_be_read_cost_one_metric(
    fense_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(fense_parts, tmp_path / "parts")
    monkeypatch.setenv("PAM_PARTS", str(tmp_path / "parts"))
    (tmp_path / "parts/fense/detector/model.safetensors").write_bytes(b"short")
    assert "cannot be used" in score_captions(REFERENCES, HYPOTHESES).details["not_computed"]["fense"]


def wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return path


def test_the_installer_unpacks_what_is_needed_and_nothing_outside(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = runpy.run_path(str(repo_root / "tools/installers/caption_metrics.py"), run_name="installer")
    good = wheel(tmp_path / "good.whl", {"a/b/x.jar": b"1", "a/b/data/y": b"2", "a/code.py": b"raise SystemExit"})
    tool["unpack"](good, "a/b/", tmp_path / "out")
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert found == ["data/y", "x.jar"]
    for name in ("a/b/../../../evil", "/a/b/evil"):
        bad = wheel(tmp_path / "bad.whl", {name: b"1"})
        with pytest.raises(SystemExit):
            tool["unpack"](bad, name[: name.index("b/") + 2], tmp_path / "out2")
    assert not (tmp_path / "out2").exists() and not list(tmp_path.rglob("evil"))
    tool["check_sha256"](good, hashlib.sha256(good.read_bytes()).hexdigest())
    with pytest.raises(SystemExit, match="SHA-256"):
        tool["check_sha256"](good, "0" * 64)


def test_the_installer_refuses_another_wheel_and_names_corenlp(repo_root: Path, tmp_path: Path) -> None:
    other = wheel(tmp_path / "other.whl", {"pycocoevalcap/meteor/meteor-1.5.jar": b"?"})
    done = install(repo_root, "meteor", "--wheel", str(other), PAM_PARTS=str(tmp_path / "parts"))
    assert done.returncode != 0 and "SHA-256" in done.stderr and not (tmp_path / "parts/meteor").exists()
    done = install(repo_root, "spice", PAM_PARTS=str(tmp_path / "parts"))
    assert done.returncode != 0 and "--corenlp" in done.stderr
