"""The mini recipe's game: its archive's reader, which lines are used, and how they are split; on small archives."""

from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from queen_archive import descriptions, dialogue, write_archive
from recipe_modules import local_modules

from pam_espnet.errors import ConfigError, DataError

LOCAL = Path(__file__).resolve().parents[2] / "egs" / "mini" / "pam1" / "local"
MODULES = ("download", "game", "queen", "text")
SPEECH = ("120000P1", "12SSSSJ1", "120006J1", "120006P1", "120006P3", "12001EP2", "12XXXXP1", "12XXXXJ2")
SPEECH += ("JOE00021", "JOE00411", "JOE00422")


@pytest.fixture(scope="module")
def local() -> Iterator[SimpleNamespace]:
    with local_modules(LOCAL, MODULES) as modules:
        yield modules


def small_files() -> dict[str, bytes]:
    """One dialogue with Tammy, two descriptions, two replies."""
    hero = {0: "Hello.*02", 6: "Who are you?*16*02"}
    person = {0: "0", 6: "I'm Tammy*02*WTand this*03is home.", 30: "*FLFollow me!*XY00(237,112)Now!"}
    files = {"TAM2.DOG": dialogue(12, hero, person, ("Hello again.*00", "*01Hi, Tammy."))}
    files["QUEEN2.JAS"] = descriptions(["A rope*24", "A key*14for a door*02"], ["No.*03", "Not now*03"])
    return files | {f"{name}.SB": name.encode() * 50 for name in SPEECH} | {"12SSSSSS.SB": b"a noise"}


# ---- the archive ----------------------------------------------------------------------------------------------------


def test_lines_have_the_texts_of_their_recordings(local: SimpleNamespace, tmp_path: Path) -> None:
    write_archive(tmp_path / "queen.1c", small_files())
    archive = local.queen.QueenArchive(tmp_path / "queen.1c")
    lines = archive.lines()
    assert [(line.name, line.voice, line.text) for line in lines] == [
        ("120006J1", "joe", "Who are you?"),
        ("120006P1", "tam", "I'm Tammy"),
        ("120006P3", "tam", "and this"),  # between *02 and *WT is a segment without text; the fourth was not recorded
        ("12001EP2", "tam", "Follow me!"),
        ("12SSSSJ1", "joe", "Hello."),
        ("12XXXXJ2", "joe", "Hi, Tammy."),
        ("12XXXXP1", "tam", "Hello again."),
        ("JOE00021", "joe", "Not now"),
        ("JOE00411", "joe", "A rope"),
        ("JOE00422", "joe", "for a door"),
    ]
    assert archive.seconds(lines[0]) == 400 / 2000
    path = local.game.extract(archive, lines[0], tmp_path / "speech")
    assert path.read_bytes() == b"120006J1" * 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda good: b"nope" + good[4:], "QTBL"),
        (lambda good: b"", "QTBL"),
        (lambda good: good[:12] + b"\2" + good[13:], "compression 2"),
        (lambda good: good[:100], "cut short within its table"),
        (lambda good: good[:-1], "table of files ends at"),
        (lambda good: good + b"\0", "table of files ends at"),
        (lambda good: good.replace(b"TAM2.DOG", b"TAM2.CAT"), None),  # one dialogue less is no damage
        (lambda good: good.replace(b"\x22I'm Tammy", b"\xffI'm Tammy"), r"TAM2\.DOG is damaged"),
        (lambda good: good.replace(b"walk to", b"talk to"), "names of verbs"),
        (lambda good: good.replace(b"QUEEN2.JAS", b"QUEEN3.JAS"), r"QUEEN2\.JAS"),
    ],
)
def test_damaged_archive_is_named(local: SimpleNamespace, tmp_path: Path, change: object, message: str | None) -> None:
    path = tmp_path / "queen.1c"
    write_archive(path, small_files())
    good = path.read_bytes()
    changed = change(good)  # type: ignore[operator]
    assert changed != good
    path.write_bytes(changed)
    if message is None:
        assert {line.voice for line in local.queen.QueenArchive(path).lines()} == {"joe"}
        return
    with pytest.raises(DataError, match=message) as caught:
        local.queen.QueenArchive(path).lines()
    assert "queen.1c" in str(caught.value) and "download.py" in str(caught.value)


def test_missing_archive_is_named(local: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"queen\.1c.*missing"):
        local.queen.QueenArchive(tmp_path / "queen.1c")


# ---- which lines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "seconds", "reason"),
    [
        ("Hello, Mr. King!", 1.0, ""),
        ("(sigh)", 1.0, "no words"),
        ("Super Soldier Treatment^_.", 1.6, ""),
        ("@@ She's beautiful! @@", 1.6, ""),
        ("Aaagh, no!", 1.0, "a cry or laughter"),
        ("Chunga warunga!", 1.0, "a cry or laughter"),
        ("You are so young.", 1.0, ""),
        ("Ha ha ha!", 1.0, "a cry or laughter"),
        ("Rry bbrddr!", 1.0, "mumbled or in cipher"),
        ("I will...", 7.0, "too long for its text"),
        ("What are you going to do when he wakes up?", 1.9, "too short for its text"),
    ],
)
def test_lines_that_cannot_be_transcribed_are_left_out(
    local: SimpleNamespace, written: str, seconds: float, reason: str
) -> None:
    assert local.game.unusable(local.game.spoken_text(written), seconds) == reason


def test_recording_with_two_texts_and_person_left_out(local: SimpleNamespace) -> None:
    lines = [local.queen.Line(*entry) for entry in (("1", "joe", "A."), ("1", "joe", "B."), ("2", "tam", "C."))]
    lines.append(local.queen.Line("3", "joe", "D."))
    archive = SimpleNamespace(lines=lambda: lines, seconds=lambda line: 1.0)
    used, unused = local.game.usable_lines(archive, ["tam"])
    assert used == [(lines[3], "d")]
    assert [reason for _, reason in unused] == ["two texts", "two texts", "person left out"]


def test_sides_share_no_text_of_three_words(local: SimpleNamespace) -> None:
    side = local.game.Side()
    side.add(["look at the old door", "yes", "open it now"])
    for text in ("yes", "at the old", "look at the old door", "please open it now", "open it now"):
        assert side.touches(text), text
    for text in ("yes please", "old door", "look at a door", "door", "open it"):
        assert not side.touches(text), text


def lines_of(local: SimpleNamespace, voice: str, texts: list[str]) -> list[tuple[object, str]]:
    return [(local.queen.Line(f"{voice}{number}", voice, text), text) for number, text in enumerate(texts)]


def test_choice_keeps_persons_and_texts_apart(local: SimpleNamespace) -> None:
    persons = {"train": {"joe": "A"}, "dev": {"ian": "B"}, "test": {"bob": "C"}, "left_out": {}}
    own = {voice: [f"{voice} says word{n} now" for n in range(30)] for voice in ("joe", "ian", "bob")}
    shared = ["what do you want", "no", "go away", "see the tall tree", "you want"]
    lines = [entry for voice, texts in own.items() for entry in lines_of(local, voice, texts + shared)]
    prompts = {"train": ["see the tall"], "dev": ["bob says word1 now"], "test": ["joe says word2 now and then"]}
    size = {"train": 20, "min_words": 2, "dev": 10, "test": 32}
    chosen = local.game.choose(lines, prompts, persons, size)
    assert chosen == local.game.choose(list(reversed(lines)), prompts, persons, size)
    assert {side: len(entries) for side, entries in chosen.items()} == {"train": 20, "dev": 10, "test": 32}
    voices = {side: [line.voice for line, _ in entries] for side, entries in chosen.items()}
    assert set(voices["train"]) == {"joe"} and set(voices["test"]) == {"bob"}
    assert sorted(voices["dev"]) == ["ian"] * 5 + ["joe"] * 5
    texts = {side: [text for _, text in entries] + prompts[side] for side, entries in chosen.items()}
    for one, other in permutations(texts, 2):
        for inner in texts[one]:
            assert inner not in texts[other]
            assert len(inner.split()) < 3 or not any(f" {inner} " in f" {outer} " for outer in texts[other])
    for side in ("dev", "test"):
        assert len(set(texts[side])) == len(texts[side]) and all(len(text.split()) > 1 for text in texts[side])
    every = local.game.choose(lines, prompts, persons, {**size, "train": None, "min_words": 1})
    assert "no" in {text for _, text in every["train"]} and {len(every["dev"]), len(every["test"])} == {10, 32}


def test_unknown_person_is_named(local: SimpleNamespace) -> None:
    nobody = {"train": {}, "dev": {}, "test": {}}
    with pytest.raises(ConfigError, match="tam"):
        local.game.choose(lines_of(local, "tam", ["hello"]), {side: [] for side in nobody}, nobody, {})


def test_no_actor_is_in_two_sets() -> None:
    table = yaml.safe_load((LOCAL / "game_voices.yaml").read_text(encoding="utf-8"))
    sides = [table[side] for side in ("train", "dev", "test")]
    for one, other in permutations(sides, 2):
        actors = [{actor for names in side.values() for actor in names.split(", ")} for side in (one, other)]
        assert not actors[0] & actors[1] and not one.keys() & other.keys()
