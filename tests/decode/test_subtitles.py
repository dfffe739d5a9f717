"""Segments as text and subtitles, to the letter."""

from pam_espnet.decode.long_recordings import Segment
from pam_espnet.decode.subtitles import to_srt, to_table, to_text, to_vtt

SEGMENTS = [
    Segment(0.0, 1.9996, "you & me <b>", None),
    Segment(2.0, 3.0, "", None),
    Segment(3599.5, 3605.25, "a sentence that is so long that it takes more than one line --> truly", None),
]


def test_srt() -> None:
    assert to_srt(SEGMENTS) == (
        "1\n00:00:00,000 --> 00:00:02,000\nyou & me <b>\n\n"
        "2\n00:59:59,500 --> 01:00:05,250\na sentence that is so long that it takes\nmore than one line --> truly\n\n"
    )


def test_vtt() -> None:
    assert to_vtt(SEGMENTS) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:02.000\nyou &amp; me &lt;b&gt;\n\n"
        "00:59:59.500 --> 01:00:05.250\na sentence that is so long that it takes\nmore than one line --&gt; truly\n\n"
    )


def test_text_and_table() -> None:
    assert to_text(SEGMENTS) == f"{SEGMENTS[0].text} {SEGMENTS[2].text}\n"
    assert to_table(SEGMENTS[:2]) == "start\tend\tanswer\n0.00\t2.00\tyou & me <b>\n2.00\t3.00\t\n"
    assert to_text([]) == "\n" and to_srt([]) == "" and to_vtt([]) == "WEBVTT\n\n"
