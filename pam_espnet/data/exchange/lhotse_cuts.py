"""Cuts of lhotse as rows: a cut with one supervision is an utterance; of a cut with several each is one.

A cut of all channels of a file is referenced where it lies; what only lhotse can make (mixed or changed cuts, one
channel of several) becomes FLAC. Recordings that are commands or addresses are not run or fetched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pam_espnet.data.exchange.rows import Row
from pam_espnet.errors import ConfigError

if TYPE_CHECKING:
    from lhotse import Recording

_WRONG = (AssertionError, KeyError, OSError, TypeError, ValueError)  # what lhotse raises for cuts that are not right
CUTS = ("MonoCut", "MultiCut", "MixedCut")  # ``type`` in a manifest


def check_lhotse() -> None:
    """Raises ConfigError: lhotse is not installed."""
    try:
        import lhotse  # noqa: F401
    except ImportError as error:
        raise ConfigError("lhotse is not installed\n  -> tools/setup.sh --extras import") from error


def read_cut(row: Row) -> Iterator[Row]:
    """A row for each supervision of the cut in a manifest's row."""
    from lhotse.audio.utils import AudioLoadingError, DurationMismatchError
    from lhotse.serialization import deserialize_item

    if row.problem:
        yield row
        return
    try:
        cut = deserialize_item(dict(row.values))
        if not cut.supervisions:
            raise ValueError("no supervision, so no text")
        parts = [cut] if len(cut.supervisions) == 1 else cut.trim_to_supervisions(keep_overlapping=False)
        for part in parts:
            yield replace(row, values=_read_utterance(part))
    except (*_WRONG, AudioLoadingError, DurationMismatchError) as error:
        yield replace(row, problem=f"cut {row.values.get('id')}: {error or type(error).__name__}".split("\n")[0])


def _read_utterance(cut: Any) -> dict[str, Any]:
    """The values of a cut with one supervision; ValueError: why it cannot be used."""
    [supervision] = cut.supervisions
    mixed = hasattr(cut, "tracks")
    recordings: list[Recording] = [
        part.recording for part in ([t.cut for t in cut.tracks] if mixed else [cut]) if getattr(part, "recording", None)
    ]
    sources = [source for recording in recordings for source in recording.sources]
    if not sources:
        raise ValueError("no recording; features alone are not audio")
    if kinds := {source.type for source in sources} - {"file", "memory"}:
        raise ValueError(f"its recording is of type {kinds.pop()}, which is not run or fetched: save it as a file")
    values = {**(getattr(cut, "custom", None) or {}), **(supervision.custom or {})}
    values |= {"id": supervision.id, "text": supervision.text, "speaker": supervision.speaker}
    if not mixed and len(sources) == 1 and sources[0].type == "file" and not recordings[0].transforms:
        channels = cut.channel if isinstance(cut.channel, list) else [cut.channel]
        if len(channels) == recordings[0].num_channels:
            whole = cut.start == 0 and cut.duration == recordings[0].duration
            piece = {} if whole else {"start": cut.start, "end": cut.end}
            return {**values, "audio": sources[0].source, **piece}
    from pam_espnet.data.pcm import encode_audio, to_pcm16

    wave = cut.load_audio().mean(axis=0)  # (C, N)
    return {**values, "audio": {"bytes": encode_audio(to_pcm16(wave)[0], cut.sampling_rate, "flac")}}
