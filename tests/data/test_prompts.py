"""Prompt files and the wording that belongs to an utterance."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pam_espnet.data.prompts import draw_prompt, read_prompts
from pam_espnet.errors import DataError


def test_read(tmp_path: Path) -> None:
    path = tmp_path / "asr.txt"
    path.write_text("# a comment\n\n  Say  it. \nWrite it.\n")
    assert read_prompts(path) == ["Say it.", "Write it."]
    path.write_text("Are there {number}?\n")
    assert read_prompts(path, ["number"]) == ["Are there {number}?"]


@pytest.mark.parametrize(
    ("content", "fields", "said"),
    [
        ("# only this\n", (), "has no wording"),
        ("a\nb\na\n", (), "x.txt:3: 'a' is there twice"),
        ("Are there many?\n", ("number",), "must have {number}"),
        ("Say {what}.\n", (), "must have no {field}"),
        ("Say {it.\n", (), "x.txt:1: "),
    ],
)
def test_mistakes(tmp_path: Path, content: str, fields: tuple[str, ...], said: str) -> None:
    (tmp_path / "x.txt").write_text(content)
    with pytest.raises(DataError) as caught:
        read_prompts(tmp_path / "x.txt", fields)
    assert said in str(caught.value) and caught.value.hint
    with pytest.raises(DataError, match="no such prompt file"):
        read_prompts(tmp_path / "y.txt")


def test_every_wording_is_drawn_and_the_same_twice() -> None:
    prompts = ["a", "b", "c"]
    drawn = {key: draw_prompt(prompts, key, 1) for key in map(str, range(300))}
    assert drawn == {key: draw_prompt(prompts, key, 1) for key in drawn}
    assert drawn != {key: draw_prompt(prompts, key, 2) for key in drawn}
    assert min(Counter(drawn.values()).values()) > 60
