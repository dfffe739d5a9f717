"""The feature cache: its shape, what makes it stale, resuming after a kill, and ESPnet reading it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from make_data import make_data, noise

from pam_espnet.data.audio import read_audio
from pam_espnet.data.feature_cache import FeatureCache, Share, cache_features
from pam_espnet.data.format import format_data_dir
from pam_espnet.data.kaldi_io import check_matrix, write_matrices
from pam_espnet.data.tables import read_table
from pam_espnet.errors import DataError
from pam_espnet.fileio import read_json

LAYERS, WIDTH, HOP = 3, 4, 160
SPEC = {"encoder": "mock", "layers": (0, 1, 2), "weights_sha256": "00"}


def encode(wave: np.ndarray) -> np.ndarray:
    """Hidden states (H,T,D) that tell their layer, frame and column apart."""
    frames = wave[: len(wave) // HOP * HOP].reshape(-1, HOP)[:, :WIDTH]  # (T,D)
    return np.stack([frames + 10 * layer for layer in range(LAYERS)])


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A formatted directory of five utterances."""
    format_data_dir(make_data(tmp_path / "data", utterances=5), tmp_path / "raw")
    return tmp_path / "raw"


def counting() -> tuple[Callable[[np.ndarray], np.ndarray], list[int]]:
    """``encode`` and a list that grows by one with every call."""
    calls: list[int] = []
    return lambda wave: calls.append(len(wave)) or encode(wave), calls


def contents(scp: Path) -> dict[str, np.ndarray]:
    """All matrices of an index, through the reader behind ESPnet's data type kaldi_ark."""
    from omniio import kaldi

    loader = kaldi.load_scp(str(scp))
    return {utt: loader[utt] for utt in loader}


def test_layers_are_side_by_side(raw: Path, tmp_path: Path) -> None:
    cache = cache_features(encode, SPEC, raw, tmp_path / "feats", shard_size=2)
    assert cache == FeatureCache(tmp_path / "feats" / "feats.scp", LAYERS, WIDTH)
    matrices = contents(cache.scp)
    assert list(matrices) == [f"utt{i}" for i in range(1, 6)]
    for utt, matrix in matrices.items():
        hidden = encode(read_audio(raw / "audio" / f"{utt}.flac")[0])
        assert matrix.dtype == np.float32 and matrix.shape == (30, LAYERS * WIDTH)
        for layer in range(LAYERS):
            np.testing.assert_array_equal(matrix[:, layer * WIDTH : (layer + 1) * WIDTH], hidden[layer])
    assert read_json(tmp_path / "feats" / "cache.json")["complete"] is True


@pytest.mark.parametrize("folder", ["with space", "with[0]:colon"])
def test_espnet_reads_it_from_any_folder(raw: Path, tmp_path: Path, folder: str) -> None:
    expected = contents(cache_features(encode, SPEC, raw, tmp_path / "feats").scp)
    found = contents(cache_features(encode, SPEC, raw, tmp_path / folder, shard_size=2).scp)
    assert list(found) == list(expected)
    for utt, matrix in expected.items():
        np.testing.assert_array_equal(found[utt], matrix)


def test_second_call_returns_at_once(raw: Path, tmp_path: Path) -> None:
    first = cache_features(encode, SPEC, raw, tmp_path / "feats")
    counted, calls = counting()
    assert cache_features(counted, SPEC, raw, tmp_path / "feats") == first
    assert calls == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights_sha256": "11"}, "changed: weights_sha256"),
        ({"layers": (0, 1)}, "changed: layers"),
        ({"new_option": 1}, "changed: new_option"),
    ],
)
def test_other_key_is_an_error_until_rebuilt(raw: Path, tmp_path: Path, change: dict, message: str) -> None:
    cache_features(encode, SPEC, raw, tmp_path / "feats", shard_size=1)
    with pytest.raises(DataError, match=message + r"(.|\n)*--rebuild_cache true"):
        cache_features(encode, SPEC | change, raw, tmp_path / "feats")
    counted, calls = counting()
    cache_features(counted, SPEC | change, raw, tmp_path / "feats", rebuild=True)
    assert len(calls) == 6  # one to learn the shape
    assert sorted(path.name for path in (tmp_path / "feats").glob("*.ark")) == ["feats.1.ark"]


def test_other_audio_is_an_error(raw: Path, tmp_path: Path) -> None:
    cache_features(encode, SPEC, raw, tmp_path / "feats")
    soundfile.write(tmp_path / "data" / "wav" / "utt2.wav", noise(0.4, seed=8), 16000)
    format_data_dir(tmp_path / "data", raw)
    with pytest.raises(DataError, match="changed: audio_sha256"):
        cache_features(encode, SPEC, raw, tmp_path / "feats")


def test_audio_that_differs_from_its_passport_is_an_error(raw: Path, tmp_path: Path) -> None:
    soundfile.write(raw / "audio" / "utt2.flac", noise(0.3, seed=8), 16000)
    with pytest.raises(DataError, match=r"utt2.flac: is not the audio its passport describes(.|\n)*stage 2"):
        cache_features(encode, SPEC, raw, tmp_path / "feats")


@pytest.mark.parametrize("kill_at", [1, 2, 4, 5])
def test_a_killed_run_loses_one_shard_at_most(raw: Path, tmp_path: Path, kill_at: int) -> None:
    whole = contents(cache_features(encode, SPEC, raw, tmp_path / "unbroken", shard_size=2).scp)
    counted, calls = counting()

    def killed(wave: np.ndarray) -> np.ndarray:
        if len(calls) == kill_at:
            raise KeyboardInterrupt
        return counted(wave)

    out = tmp_path / "feats"
    with pytest.raises(KeyboardInterrupt):
        cache_features(killed, SPEC, raw, out, shard_size=2)
    assert not (out / "feats.scp").exists()
    (out / ".feats.9.tmp-1.ark").write_bytes(b"what kill -9 leaves")
    kept = len(list(out.glob("feats.*.scp")))
    assert kept == (kill_at - 1) // 2  # of three shards; the first call only learns the shape
    before = len(calls)
    cache = cache_features(counted, SPEC, raw, out, shard_size=3)  # continues with the shards it has
    assert len(calls) - before == 1 + 5 - 2 * kept
    assert not list(out.glob(".*.tmp-*"))
    resumed = contents(cache.scp)
    assert list(resumed) == list(whole)
    for utt, matrix in whole.items():
        np.testing.assert_array_equal(resumed[utt], matrix)


def test_missing_ark_is_made_again(raw: Path, tmp_path: Path) -> None:
    cache = cache_features(encode, SPEC, raw, tmp_path / "feats", shard_size=2)
    (tmp_path / "feats" / "feats.2.ark").unlink()
    counted, calls = counting()
    cache_features(counted, SPEC, raw, tmp_path / "feats")
    assert len(calls) == 1 + 2
    assert len(contents(cache.scp)) == 5


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda wave: encode(wave)[0], r"gave shape \(30, 4\)"),
        (lambda wave: encode(wave)[:, :0], r"gave shape \(3, 0, 4\)"),
        (lambda wave: encode(wave) * np.nan, "not finite"),
        (lambda wave: encode(wave)[: 2 if wave[0] < 0 else 3], r"gave shape \(2, 30, 4\) where \(3, frames, 4\)"),
    ],
)
def test_bad_hidden_states(raw: Path, tmp_path: Path, bad: Callable, message: str) -> None:
    with pytest.raises(DataError, match=message):
        cache_features(bad, SPEC, raw, tmp_path / "feats")
    assert not (tmp_path / "feats" / "feats.scp").exists()


def test_full_disk_is_an_error_before_the_work(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    counted, calls = counting()
    with pytest.raises(DataError, match="the feature cache needs"):
        cache_features(counted, SPEC, raw, tmp_path / "feats")
    assert len(calls) == 1


def test_not_formatted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not formatted"):
        cache_features(encode, SPEC, make_data(tmp_path / "data"), tmp_path / "feats")


def test_matrices_come_back(tmp_path: Path) -> None:
    matrices = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b-ä": np.ones((1, 5), dtype=np.float32).T}
    index = write_matrices(tmp_path / "x.ark", tmp_path / "x.scp", matrices.items())
    assert read_table(tmp_path / "x.scp") == index
    found = contents(tmp_path / "x.scp")
    for key, matrix in matrices.items():
        np.testing.assert_array_equal(found[key], matrix)
        check_matrix(found[key], key)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.ones((2, 3)), "dtype float64"),
        (np.ones((2, 3), dtype=np.int16), "dtype int16"),
        (np.ones(3, dtype=np.float32), r"shape \(3,\)"),
        (np.ones((0, 3), dtype=np.float32), r"shape \(0, 3\)"),
        (np.array([[1.0, np.nan]], dtype=np.float32), "NaN or infinite"),
        (np.array([[1.0, np.inf]], dtype=np.float32), "NaN or infinite"),
    ],
)
def test_other_matrices_are_refused(matrix: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message + r"(.|\n)*--rebuild_cache true"):
        check_matrix(matrix, "utterance 'a'")


def test_processes_with_other_encoders_are_refused(raw: Path, tmp_path: Path) -> None:
    other = Share(0, 2, lambda value: [value, (None, {**SPEC, "encoder_dtype": "bfloat16"})])
    with pytest.raises(DataError, match=r"differ in precision(.|\n)*encoder_dtype"):
        cache_features(encode, SPEC, raw, tmp_path / "feats", share=other)
