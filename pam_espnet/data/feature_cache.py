"""Hidden states of a frozen encoder, computed once per utterance and kept as Kaldi matrices.

No encoder is imported: the caller gives a function from a wave to its hidden states, and a description of it that
becomes part of the cache's key. Written in shards, each whole or absent, so a killed run loses one shard at most;
several processes, on several machines, share them.
Shape letters: N samples, H layers, T encoder frames, D width.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pam_espnet.data.audio import read_audio
from pam_espnet.data.datadir import DataDir
from pam_espnet.data.download import check_space
from pam_espnet.data.kaldi_io import REBUILD_HINT, write_matrices
from pam_espnet.data.passport import FORMAT_HINT, Passport
from pam_espnet.data.pcm import pcm16_sha256, to_pcm16
from pam_espnet.data.tables import read_table, write_table
from pam_espnet.errors import DataError
from pam_espnet.fileio import compare_keys, read_json, write_json

STATE = "cache.json"
_ALIKE_HINT = "set frontend_conf.encoder_dtype to float32 or bfloat16, and give all machines the same models"


@dataclass(frozen=True)
class FeatureCache:
    """A complete cache: ``scp`` indexes matrices (T, H*D), columns [h*D:(h+1)*D] are layer h."""

    scp: Path
    num_layers: int
    width: int


@dataclass(frozen=True)
class Share:
    """The shards of this process: the ``rank``-th of those to do, and every ``processes``-th after it."""

    rank: int = 0
    processes: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]  # a value of each process, in all, once all have come


def cache_features(
    encode: Callable[[np.ndarray], np.ndarray],
    spec: dict[str, Any],
    data_dir: str | Path,
    out_dir: str | Path,
    *,
    shard_size: int = 100,
    rebuild: bool = False,
    share: Share = Share(),
) -> FeatureCache:
    """Write ``<out_dir>/feats.scp`` for every utterance of a formatted data directory; return at once if it is there.

    Args:
        encode: wave (N,) float32 at the data directory's sample rate -> hidden states (H, T, D) float.
        spec: JSON values that the hidden states depend on besides the audio (encoder type, layers, weights_sha256
            ...); with the digest of the audio it is the cache's key.
        data_dir: ``dump/raw/<set>``, with a passport.
        out_dir: ``dump/feats/<encoder>/<set>``; paths in feats.scp begin with it as it is given.
        shard_size: utterances per ark file.
        rebuild: remove an existing cache instead of completing it.
        share: this process's part, where several call this together; the first one writes all but shards.

    Raises DataError: a cache with another key is there and ``rebuild`` is false; audio differs from its passport;
    the disk is too small; ``encode`` gave something else than finite (H, T, D); processes have other ``spec``.
    """
    data, passport, out = DataDir.load(data_dir), Passport.load(data_dir), Path(out_dir)
    encoder = _Encoder(encode, data, passport)
    begun = _begin(encoder, spec, out, shard_size, rebuild) if share.rank == 0 else None
    every = share.gather((begun, spec))
    if any(other != spec for _, other in every):
        raise DataError(out, "its processes differ in precision or weights of the encoder", hint=_ALIKE_HINT)
    state, todo = every[0][0]
    scp, encoder.num_layers, encoder.width = out / "feats.scp", state["num_layers"], state["width"]
    if not state["complete"]:
        shards = _shards(data.utterances, out, state["shard_size"])
        own = [shards[number] for number in todo[share.rank :: share.processes]]
        # Indices as values, because other machines may see each other's new files late.
        written = share.gather(_write_shards(encoder, own, f"{out.parent.name} {out.name}", share.rank == 0))
        if share.rank == 0:
            there = [read_table(shard.scp) for number, shard in enumerate(shards) if number not in set(todo)]
            index = {utt: matrix for part in (*there, *written) for utt, matrix in part.items()}
            write_table(scp, {utt: index[utt] for utt in data.utterances})
            write_json(out / STATE, state | {"complete": True})
    return FeatureCache(scp, encoder.num_layers, encoder.width)


def _begin(
    encoder: _Encoder, spec: Mapping[str, Any], out: Path, shard_size: int, rebuild: bool
) -> tuple[dict[str, Any], list[int]]:
    """What is noted of the cache, with its key compared or written; which shards are to be done."""
    data, state_file, scp = encoder.data, out / STATE, out / "feats.scp"
    # as JSON gives it back, so that a tuple equals the list it becomes
    key = json.loads(json.dumps({**spec, "audio_sha256": encoder.passport.audio_digest(data.wav)}))
    if rebuild:  # the key last: what a kill leaves is still recognised as the old cache
        for pattern in ("feats.scp", "feats.*.scp", "feats.*.ark", STATE):
            for path in out.glob(pattern):
                path.unlink()
    state: dict[str, Any] = {"shard_size": shard_size}
    if state_file.is_file():
        state = read_json(state_file)
        compare_keys(state_file, state["key"], key, REBUILD_HINT)
    shards = _shards(data.utterances, out, state["shard_size"])
    todo = [number for number, shard in enumerate(shards) if not shard.is_done()]
    if state.get("complete") and not todo and scp.is_file():
        logging.info("%s is complete", scp)
        return state, []
    for leftover in out.glob(".*.tmp-*"):
        leftover.unlink()
    encoder.check_space(out)
    state |= {"complete": False, "num_layers": encoder.num_layers, "width": encoder.width, "key": key}
    write_json(state_file, state)
    if len(todo) < len(shards):
        logging.info("%s: %d of %d shards are there already", out, len(shards) - len(todo), len(shards))
    return state, todo


@dataclass(frozen=True)
class _Shard:
    ark: Path
    scp: Path
    utterances: list[str]

    def is_done(self) -> bool:
        """The index is written after the ark, so where it is, the ark is whole (unless somebody removed it)."""
        return self.scp.is_file() and self.ark.is_file() and list(read_table(self.scp)) == self.utterances


def _shards(utterances: list[str], out: Path, size: int) -> list[_Shard]:
    parts = [utterances[start : start + size] for start in range(0, len(utterances), size)]
    return [_Shard(out / f"feats.{n}.ark", out / f"feats.{n}.scp", part) for n, part in enumerate(parts, 1)]


def _write_shards(encoder: _Encoder, todo: list[_Shard], name: str, show: bool) -> dict[str, str]:
    """Write shards; their index, {utterance: matrix}."""
    from tqdm import tqdm

    index: dict[str, str] = {}
    total = sum(len(shard.utterances) for shard in todo)
    with tqdm(total=total, desc=f"features {name}", disable=not (show and todo)) as progress:

        def matrices(shard: _Shard) -> Iterator[tuple[str, np.ndarray]]:
            for utt in shard.utterances:
                yield utt, encoder(utt)
                progress.update()

        for shard in todo:
            index |= write_matrices(shard.ark, shard.scp, matrices(shard))
    return index


class _Encoder:
    """From an utterance's name to its matrix (T, H*D), with checks of the audio and of the hidden states."""

    def __init__(self, encode: Callable[[np.ndarray], np.ndarray], data: DataDir, passport: Passport) -> None:
        self.encode, self.data, self.passport = encode, data, passport
        self.num_layers = self.width = 0

    def check_space(self, out: Path) -> None:
        """Encode one utterance to learn H and D, and whether all of them fit on the disk."""
        seconds = {utt: self.passport.utterances[utt]["seconds"] for utt in self.data.utterances}
        first = self.data.utterances[0]
        needed = self(first).nbytes / seconds[first] * sum(seconds.values())
        there = sum(ark.stat().st_size for ark in out.glob("feats.*.ark"))
        check_space(out, round(max(0, needed - there)), "the feature cache")
        out.mkdir(parents=True, exist_ok=True)

    def __call__(self, utt: str) -> np.ndarray:
        value, start, end = self.data.source(utt)
        wave, _ = read_audio(value, start=start, end=end)
        if pcm16_sha256(to_pcm16(wave)[0]) != self.passport.utterances[utt]["sha256"]:
            raise DataError(value, "is not the audio its passport describes", hint=FORMAT_HINT + " again")
        hidden = np.asarray(self.encode(wave), dtype=np.float32)  # (H,T,D)
        expected = f"({self.num_layers}, frames, {self.width})" if self.width else "(layers, frames, width)"
        problem = ""
        if hidden.ndim != 3 or 0 in hidden.shape or (self.width and hidden.shape[::2] != (self.num_layers, self.width)):
            problem = f"the encoder gave shape {hidden.shape} where {expected} is expected"
        elif not np.isfinite(hidden).all():
            problem = "the encoder's hidden states are not finite"
        if problem:
            raise DataError(value, f"{utt}: {problem}", hint="try float32, or leave the utterance out")
        self.num_layers, _, self.width = hidden.shape
        return hidden.transpose(1, 0, 2).reshape(hidden.shape[1], -1)  # (T, H*D)
