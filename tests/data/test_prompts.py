"""Prompt files and the wording that belongs to an utterance."""

from collections import Counter
from pathlib import Path

import pytest

from pam_espnet.data.datadir import DataDir
from pam_espnet.data.edit import reword
from pam_espnet.data.prompts import Wordings, draw_prompt, read_prompts
from pam_espnet.errors import DataError


def test_read(tmp_path: Path) -> None:
    path = tmp_path / "asr.txt"
    path.write_text("# a comment\n\n  Say  it. \nWrite it.\n")
    assert read_prompts(path) == ["Say it.", "Write it."]
    path.write_text("Are there {number}?\n")
    assert read_prompts(path, ["number"]) == ["Are there {number}?"]


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffSay it.\r\nWrite it.\r\n".encode(),  # as Windows' Notepad saves it
        "\ufeff# wordings\nSay it.\nWrite it.".encode(),
        b"# wordings\rSay it.\rWrite it.\r",
    ],
)
def test_files_of_other_systems_are_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    assert read_prompts(tmp_path / "x.txt") == Wordings(tmp_path / "x.txt").prompts == ["Say it.", "Write it."]


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        ("Say it.\n\nÉcoutez.\n".encode("latin-1"), (), "x.txt:3: not UTF-8 (byte 0xc9 at column 1)\n  -> convert"),
        ("Say it.\n".encode("utf-16"), (), "iconv -f utf-16"),
        ("# only this\n", (), "has no wording"),
        ("a\nb\na\n", (), "x.txt:3: 'a' is there twice"),
        ("Are there many?\n", ("number",), "must have {number}"),
        ("Say {what}.\n", (), "must have no {field}"),
        ("Say {it.\n", (), "x.txt:1: "),
        ('Answer as JSON {"text": ...}\n', (), "x.txt:1: "),
        ("Is it {0}?\n", None, "x.txt:1: 'Is it {0}?': {0} is no {field}"),
    ],
)
def test_mistakes(tmp_path: Path, content: str | bytes, fields: tuple[str, ...] | None, message: str) -> None:
    (tmp_path / "x.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read_prompts(tmp_path / "x.txt", fields)
    assert message in str(caught.value) and caught.value.hint
    with pytest.raises(DataError, match="no such prompt file"):
        read_prompts(tmp_path / "y.txt")


def test_every_wording_is_drawn_and_the_same_twice() -> None:
    prompts = ["a", "b", "c"]
    drawn = {key: draw_prompt(prompts, key, 1) for key in map(str, range(300))}
    assert drawn == {key: draw_prompt(prompts, key, 1) for key in drawn}
    assert drawn != {key: draw_prompt(prompts, key, 2) for key in drawn}
    assert min(Counter(drawn.values()).values()) > 60


# ---- other wordings of a prompt -------------------------------------------------------------------------------------


@pytest.fixture
def verify(tmp_path: Path) -> Wordings:
    (tmp_path / "verify.txt").write_text(
        "# a comment\nAre there {number}? Yes or no.\nI count {number}. Right?\nIs it {number}?\n"
    )
    return Wordings(tmp_path / "verify.txt")


def test_a_prompt_is_recognised_and_reworded(verify: Wordings, tmp_path: Path) -> None:
    assert verify.recognise("I count ten. Right?") == (1, {"number": "ten"})
    assert [verify.ask("Are there ten? Yes or no.", n) for n in (1, 2)] == ["I count ten. Right?", "Is it ten?"]
    with pytest.raises(DataError, match=r"verify\.txt: has no wording for the prompt 'Count\.'\n.*stage 1"):
        verify.recognise("Count.")
    (tmp_path / "asr.txt").write_text("What? (Say it.)\nWrite {{it}}.\n")
    asr = Wordings(tmp_path / "asr.txt")  # signs that mean something in patterns, and braces
    assert asr.ask("What? (Say it.)", 1) == "Write {it}." and asr.ask("Write {it}.", 0) == "What? (Say it.)"


def test_a_draw_depends_on_seed_epoch_and_utterance_alone(verify: Wordings) -> None:
    prompt = "Are there two? Yes or no."
    drawn = {(k, s, e): verify.draw(prompt, f"u{k}", s, e) for k in range(60) for s in (1, 2) for e in (1, 2)}
    assert drawn == {(k, s, e): verify.draw("Is it two?", f"u{k}", s, e) for k, s, e in drawn}
    for fixed in ((1, 1), (1, 2), (2, 1)):
        counts = Counter(drawn[k, *fixed] for k in range(60))
        assert len(counts) == 3 and min(counts.values()) >= 10
    assert [drawn[k, 1, 1] for k in range(60)] != [drawn[k, 1, 2] for k in range(60)]
    assert [drawn[k, 1, 1] for k in range(60)] != [drawn[k, 2, 1] for k in range(60)]


def test_a_test_set_in_every_wording(verify: Wordings, tmp_path: Path) -> None:
    (tmp_path / "asr.txt").write_text("Say it.\nWrite it.\n")
    tables = {
        "wav": {"a": "a.wav", "v": "v.wav"},
        "text": {"a": "yes", "v": "no"},
        "prompt": {"a": "Say it.", "v": "Are there two? Yes or no."},
        "utt2task": {"a": "asr", "v": "verify"},
        "utt2spk": {"a": "a", "v": "v"},
    }
    DataDir(path=tmp_path / "test", **tables).save()
    wordings = {"verify": verify, "asr": Wordings(tmp_path / "asr.txt")}
    written = reword(tmp_path / "test", wordings, tmp_path / "other")
    assert [path.name for path in written] == ["2", "3"]
    two, three = map(DataDir.load, written)
    assert two.prompt == {"a": "Write it.", "v": "I count two. Right?"} and two.wav == tables["wav"]
    assert three.prompt == {"v": "Is it two?"} and three.text == {"v": "no"}  # asr has two wordings
    with pytest.raises(DataError, match="a is not asked in the first wording"):
        reword(written[0], wordings, tmp_path / "again")
