"""Where recordings are cut: every sample with speech is in one piece, and no sample is in two."""

import tracemalloc
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pam_espnet.decode.segments import MARGIN, PAUSE, Piece, cut_at_pauses, cut_into_windows
from pam_espnet.decode.voice_activity import FRAME

RATE = 16000
SECOND = FRAME / RATE


def loud(frames: np.ndarray) -> np.ndarray:
    return np.abs(frames).max(axis=1) > 0.1


def recording(*parts: tuple[float, float]) -> np.ndarray:
    """(seconds, amplitude) of noise, one after the other (N,)."""
    rng = np.random.default_rng(0)
    return np.concatenate([a * rng.uniform(-1, 1, round(s * RATE)) for s, a in parts]).astype(np.float32)


def in_blocks(wave: np.ndarray, size: int = 5 * RATE) -> Iterator[np.ndarray]:
    return (wave[start : start + size] for start in range(0, len(wave), size))


def cut(wave: np.ndarray, max_seconds: float = 30.0, size: int = 5 * RATE) -> list[Piece]:
    pieces = list(cut_at_pauses(in_blocks(wave, size), RATE, loud, max_seconds))
    for piece in pieces:  # the samples are those of its times
        start, end = round(piece.start * RATE), round(piece.end * RATE)
        np.testing.assert_array_equal(piece.wave, wave[start:end])
        assert 0.1 < piece.end - piece.start <= max_seconds
    assert all(one.end <= other.start for one, other in pairwise(pieces))
    return pieces


def test_pieces_lie_between_pauses() -> None:
    wave = recording((1.0, 0.01), (2.0, 0.5), (0.3, 0.01), (1.0, 0.5), (0.8, 0.01), (3.0, 0.5), (2.0, 0.01))
    first, second = cut(wave)
    times = [(1.0, 4.3), (5.1, 8.1)]  # 0.3 s is no pause
    for piece, (start, end) in zip((first, second), times, strict=True):
        assert piece.start == pytest.approx(start - MARGIN, abs=2 * SECOND)
        assert piece.end == pytest.approx(end + MARGIN, abs=2 * SECOND)


def test_speech_without_a_pause_is_cut_where_it_is_quietest() -> None:
    wave = recording((8.0, 0.5), (0.2, 0.2), (7.0, 0.5), (0.2, 0.2), (9.0, 0.5))
    pieces = cut(wave, max_seconds=10.0)
    assert [one.end for one in pieces[:2]] == pytest.approx([8.1, 15.3], abs=0.1)
    assert [one.start for one in pieces] == pytest.approx([0.0, pieces[0].end, pieces[1].end], abs=1e-9)
    assert pieces[-1].end == pytest.approx(len(wave) / RATE)


@pytest.mark.parametrize("seconds", [0.0, 0.01, 3.0, 100.0])
def test_nothing_to_find(seconds: float) -> None:
    assert cut(recording((seconds, 0.01))) == []


def test_a_click_is_no_speech_and_a_word_is() -> None:
    assert cut(recording((5.0, 0.0), (0.03, 0.5), (5.0, 0.0))) == []
    (word,) = cut(recording((300.0, 0.0), (0.2, 0.5), (300.0, 0.0)))
    assert word.start == pytest.approx(300 - MARGIN, abs=2 * SECOND) and word.end - word.start < 0.8


def test_memory_does_not_grow_with_the_length() -> None:
    peaks = []
    for times in (20, 200):
        tracemalloc.start()
        blocks = (recording((2.0, 0.5), (3.0, 0.0)) for _ in range(times))
        assert sum(1 for _ in cut_at_pauses(blocks, RATE, loud, 30.0)) == times
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < 10e6  # bytes; the samples of the longer one are 64 MB


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.tuples(st.floats(0.0, 4.0), st.sampled_from([0.0, 0.5])), max_size=12),
    max_seconds=st.floats(1.0, 6.0),
    size=st.integers(100, 60000),
)
def test_all_speech_is_in_one_piece(parts: list[tuple[float, float]], max_seconds: float, size: int) -> None:
    wave = recording((0.0, 0.0), *parts)
    pieces = cut(wave, max_seconds, size)
    covered = np.zeros(len(wave), dtype=bool)
    for piece in pieces:
        covered[round(piece.start * RATE) : round(piece.end * RATE)] = True
    at = 0
    for seconds, amplitude in parts:
        samples = round(seconds * RATE)
        if amplitude and seconds >= 0.3:
            assert covered[at : at + samples].all()
        at += samples
    assert [one.start for one in pieces] == [one.start for one in cut(wave, max_seconds, 7777)]


def test_pauses_are_kept_apart_from_pieces() -> None:
    silent = PAUSE + 4 * SECOND
    pieces = cut(recording((1.0, 0.5), (silent, 0.0), (1.0, 0.5)))
    assert len(pieces) == 2 and pieces[0].end <= 1.0 + silent / 2 + 2 * SECOND


def test_windows() -> None:
    wave = recording((25.3, 0.5))
    windows = list(cut_into_windows(in_blocks(wave), RATE, 10.0))
    assert [(one.start, one.end) for one in windows] == [(0.0, 10.0), (10.0, 20.0), (20.0, 25.3)]
    np.testing.assert_array_equal(np.concatenate([one.wave for one in windows]), wave)
    assert len(list(cut_into_windows(in_blocks(wave[: 20 * RATE + 100]), RATE, 10.0))) == 2  # 6 ms are no window
