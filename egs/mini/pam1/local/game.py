"""Acted lines of the game: which are used, and which persons' and texts are in training, dev and ``test_voices``.

The persons of ``test_voices``, and half of the lines of dev, are in no other set, nor are their actors. No text is on
two sides, nor a text of three or more words that is contained in a text of another side, prompts included.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from download import find_unpacked
from queen import Line, QueenArchive
from text import normalise

from pam_espnet.config import load_yaml
from pam_espnet.errors import ConfigError
from pam_espnet.fileio import atomic_path

PACKAGE = "flight-of-the-amazon-queen"
MIN_SHARED_WORDS = 3
# A line lasts between these: the pauses around it, and characters per second of the slowest and the fastest speech.
PAUSES, SLOWEST, FASTEST = 1.5, 5.0, 20.0
# Cries, laughter and mumbling have no spelling that could be expected: words of three equal letters in a row ("aaagh"),
# without a vowel ("mmrnl"; not "mr" and the like), and these.
STRETCHED = re.compile(r"(.)\1\1")
MUMBLED = re.compile(r"[^aeiouy']{2,}")
ABBREVIATIONS = frozenset(("mr", "mrs", "dr", "vs", "tv", "fx"))
CRIES = re.compile(
    r"\w*ungh?a|ungh|ugga|aark|aroo[fp]?|arrgh|ack|eep|eurgh|faark|gah|ha[hr]?|haar|he[eh]|nyah|ook|oop|ptooie|ruff|"
    r"squa[rw]k|warrk|whoo[fp]|woof|changa|wanga|tuwanga|hvxivg"  # the last: chants and a cipher
)

Entry = tuple[Line, str]  # with its normalised text, or why it is left out


@dataclass
class Side:
    """Texts of one side, and everything that no text of another side may be or contain."""

    whole: set[str] = field(default_factory=set)
    runs: set[str] = field(default_factory=set)

    def add(self, texts: Iterable[str]) -> None:
        """Put ``texts`` on this side."""
        for text in texts:
            self.whole.add(text)
            self.runs |= shared_runs(text)

    def touches(self, text: str) -> bool:
        """Whether ``text`` is one of this side, or one of three or more words contains the other."""
        return text in self.runs or not self.whole.isdisjoint(shared_runs(text))


def shared_runs(text: str) -> set[str]:
    """The text, and all runs of three or more words in it."""
    words = text.split()
    ends = range(len(words) + 1)
    runs = {" ".join(words[first:last]) for last in ends for first in range(last - MIN_SHARED_WORDS + 1)}
    return runs | {text}


def spoken_text(text: str) -> str:
    """A line as a target: trade marks (``^_``) and notes (``@@``) are not spoken."""
    return normalise(text.replace("^_", " ").replace("@", " "))


def unusable(text: str, seconds: float) -> str:
    """Why a line with this normalised text is left out; empty: it is used."""
    words = text.split()
    if not words:
        return "no words"
    if any(STRETCHED.search(word) or CRIES.fullmatch(word) for word in words):
        return "a cry or laughter"
    if any(MUMBLED.fullmatch(word) and word not in ABBREVIATIONS for word in words):
        return "mumbled or in cipher"
    if seconds > PAUSES + len(text) / SLOWEST:
        return "too long for its text"
    return "too short for its text" if seconds < len(text) / FASTEST else ""


def usable_lines(archive: QueenArchive, left_out: Container[str] = ()) -> tuple[list[Entry], list[Entry]]:
    """The lines that are used with their normalised texts, and the others with the reason; ``left_out``: persons."""
    lines = archive.lines()
    names = Counter(line.name for line in lines)
    used: list[Entry] = []
    unused: list[Entry] = []
    for line in lines:
        text = spoken_text(line.text)
        reason = unusable(text, archive.seconds(line))
        if line.voice in left_out:
            reason = "person left out"
        elif names[line.name] > 1:
            reason = "two texts"
        (unused if reason else used).append((line, reason or text))
    return used, unused


def choose(
    lines: list[Entry], prompts: dict[str, list[str]], persons: dict[str, dict[str, str]], size: dict[str, Any]
) -> dict[str, list[Entry]]:
    """The lines of train, dev and test.

    Lines are taken in the order of the SHA-256 of their text (dev, test; each text once) or name (training).

    Args:
        prompts: texts of the other recordings by side.
        persons: game_voices.yaml.
        size: train, dev, test: at most this many lines, train null: all; min_words of a training line.
    """
    side_of = {person: side for side, names in persons.items() for person in names}
    if unknown := sorted({line.voice for line, _ in lines} - side_of.keys()):
        raise ConfigError(f"game_voices.yaml: {unknown[0]} of the game is in no set; add it to one")
    sides = {name: Side() for name in ("train", "dev", "test")}
    for name, side in sides.items():
        side.add(prompts[name])

    def take(name: str, voices: str, limit: int) -> list[Entry]:
        """``limit`` lines of more than one word, and of texts that touch no other side nor are there already."""
        taken: list[Entry] = []
        others = [side for other, side in sides.items() if other != name]
        for line, text in sorted(lines, key=lambda entry: (_digest(entry[1]), entry[0].name)):
            new = len(text.split()) > 1 and side_of[line.voice] == voices and text not in sides[name].whole
            if len(taken) < limit and new and not any(side.touches(text) for side in others):
                taken.append((line, text))
                sides[name].add([text])
        return taken

    chosen = {"test": take("test", "test", size["test"])}
    chosen["dev"] = take("dev", "dev", size["dev"] // 2)
    chosen["dev"] += take("dev", "train", size["dev"] - len(chosen["dev"]))
    train = [
        (line, text)
        for line, text in sorted(lines, key=lambda entry: _digest(entry[0].name))
        if side_of[line.voice] == "train"
        and len(text.split()) >= size["min_words"]
        and not (sides["dev"].touches(text) or sides["test"].touches(text))
    ]
    return {"train": train[: size["train"]], **chosen}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_persons(table: Path) -> dict[str, dict[str, str]]:
    """game_voices.yaml: {side, or left_out: {person: actors}}."""
    return load_yaml(table)


def plan(
    downloads: Path, folder: Path, prompts: dict[str, list[str]], size: dict[str, Any], tables: Path
) -> dict[str, list[tuple[Line, str, Path]]]:
    """Lines, texts and files of speech of train, dev and test; ``FOLDER/left_out.tsv`` lists the lines left out."""
    archive = QueenArchive(find_unpacked(downloads, PACKAGE) / f"usr/share/scummvm/{PACKAGE}/queen.1c")
    persons = read_persons(tables / "game_voices.yaml")
    used, unused = usable_lines(archive, persons["left_out"])
    report(unused, folder / "left_out.tsv")
    chosen = choose(used, prompts, persons, size)
    speech = downloads / "unpacked" / f"{PACKAGE}-speech"
    return {
        side: [(line, text, extract(archive, line, speech)) for line, text in lines] for side, lines in chosen.items()
    }


def extract(archive: QueenArchive, line: Line, folder: Path) -> Path:
    """The file of a line's speech, written if it is not there yet."""
    path = folder / f"{line.name}.mp3"
    if not path.exists():
        with atomic_path(path) as tmp:
            tmp.write_bytes(archive.read(f"{line.name}.SB"))
    return path


def report(unused: list[Entry], path: Path) -> None:
    """List the lines that are left out in a table, and print how many for which reason."""
    with atomic_path(path) as tmp:
        tmp.write_text("".join(f"{line.name}\t{line.voice}\t{why}\t{line.text}\n" for line, why in unused), "utf-8")
    reasons = ", ".join(f"{why} {n}" for why, n in sorted(Counter(why for _, why in unused).items()))
    print(f"game: {len(unused)} lines left out: {reasons} ({path})")
