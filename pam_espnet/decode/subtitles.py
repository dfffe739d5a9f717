"""Segments of a recording as files: plain text, a table, JSON, and subtitles (SubRip .srt, WebVTT .vtt)."""

import html
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from pam_espnet.decode.long_recordings import Segment

LINE = 42  # characters of a subtitle's line, as broadcasters have it


def to_text(segments: Iterable[Segment]) -> str:
    """The words of all segments on one line."""
    return " ".join(one.text for one in segments if one.text) + "\n"


def to_table(segments: Iterable[Segment]) -> str:
    """Start, end and answer of each, between tabs, under a line with their names."""
    rows = [f"{one.start:.2f}\t{one.end:.2f}\t{one.text}" for one in segments]
    return "\n".join(["start\tend\tanswer", *rows]) + "\n"


def to_srt(segments: Iterable[Segment]) -> str:
    """SubRip; segments without text are left out."""
    cues = [(_clock(one.start, ","), _clock(one.end, ","), _lines(one.text)) for one in segments if one.text]
    return "".join(f"{number}\n{start} --> {end}\n{text}\n\n" for number, (start, end, text) in enumerate(cues, 1))


def to_vtt(segments: Iterable[Segment]) -> str:
    """WebVTT, in which &, < and > are escaped; segments without text are left out."""
    cues = [(_clock(one.start, "."), _clock(one.end, "."), _lines(one.text)) for one in segments if one.text]
    return "WEBVTT\n\n" + "".join(f"{start} --> {end}\n{html.escape(text, False)}\n\n" for start, end, text in cues)


def values(segments: Sequence[Segment]) -> dict[str, Any]:
    """The joined answer and every segment with its n-best, as JSON values."""
    return {
        "answer": to_text(segments).rstrip("\n"),
        "segments": [
            {
                "start": round(one.start, 3),
                "end": round(one.end, 3),
                "answer": one.text,
                "hypotheses": [
                    {"text": text, "score": score}
                    for text, score in (zip(one.answer.texts, one.answer.scores, strict=True) if one.answer else ())
                ],
                "answer_log_probs": one.answer.answer_log_probs if one.answer else None,
            }
            for one in segments
        ],
        "routing": next((one.answer.routing for one in segments if one.answer), None),
    }


def _clock(seconds: float, mark: str) -> str:
    """``hh:mm:ss`` and milliseconds behind ``mark``."""
    minutes, milliseconds = divmod(round(1000 * seconds), 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}{mark}{milliseconds % 1000:03d}"


def _lines(text: str) -> str:
    return "\n".join(textwrap.wrap(text, LINE, break_long_words=False, break_on_hyphens=False))
