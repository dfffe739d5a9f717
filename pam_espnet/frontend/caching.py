"""Cached hidden states of a configured encoder: the cache's key, and how one utterance is encoded for it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pam_espnet.data.feature_cache import FeatureCache, cache_features
from pam_espnet.errors import ConfigError
from pam_espnet.fileio import exclusive, write_json
from pam_espnet.frontend.encoder_spec import EncoderSpec
from pam_espnet.frontend.encoders.base import layer_dtype
from pam_espnet.frontend.encoders.registry import build_encoder


def cache_encoder(
    name: str,
    device: str,
    frontend_conf: Mapping[str, Any],
    data_dirs: Sequence[str | Path],
    root: Path,
    rebuild: bool,
) -> list[FeatureCache]:
    """Cache the hidden states of encoder ``name`` over each data directory under ``root/<name>/<set>``.

    Also writes ``root/<name>/spec.json``, with which training uses the cache without loading the encoder.

    Raises:
        ConfigError: no such encoder in ``frontend_conf.encoders``, or one that cannot have ``encoder_dtype``.
        DataError: see ``data.feature_cache.cache_features``.
    """
    encoders = frontend_conf.get("encoders") or {}
    if name not in encoders:
        raise ConfigError(f"frontend_conf.encoders has no {name!r}; it has {', '.join(encoders)}")
    encoder = build_encoder(**encoders[name])
    spec = EncoderSpec.of(name, encoder)
    # Without the path: the same weights in another folder give the same features.
    options = {key: value for key, value in encoders[name].items() if key != "path"}
    key = {"encoder": options, "spec": spec.to_dict(), "weights_sha256": encoder.weights_sha256()}
    dtype = layer_dtype(frontend_conf.get("encoder_dtype", "auto"), type(encoder), device)
    if dtype != torch.float32:  # as in version 0.1, a key without the entry means float32
        key["encoder_dtype"] = str(dtype).removeprefix("torch.")
    encoder.use_dtype(dtype).to(device)

    def encode(wave: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(wave)[None].to(device)
        hidden, frames = encoder(batch, torch.tensor([len(wave)], device=device))
        return hidden[0, :, : int(frames[0])].float().cpu().numpy()

    caches = []
    for data_dir in data_dirs:
        out = root / name / Path(data_dir).name
        with exclusive(out / ".lock"):
            caches.append(cache_features(encode, key, data_dir, out, rebuild=rebuild))
    write_json(root / name / "spec.json", spec.to_dict())
    return caches


def cache_encoders(
    names: Sequence[str],
    frontend_conf: Mapping[str, Any],
    data_dirs: Sequence[str | Path],
    root: Path,
    *,
    rebuild: bool = False,
    device: str = "cpu",
    jobs: int = 1,
) -> Iterator[FeatureCache]:
    """Cache the hidden states of several encoders, ``jobs`` at a time, each in a process with one thread (small models
    gain little from a second one) and, where there are several GPUs, on a separate one. Raises as ``cache_encoder``."""
    run = partial(cache_encoder, frontend_conf=frontend_conf, data_dirs=data_dirs, root=root, rebuild=rebuild)
    if jobs <= 1 or len(names) == 1:
        for name in names:
            yield from run(name, device)
        return
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    devices = [f"cuda:{number % gpus}" if gpus else device for number in range(len(names))]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(names)), spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for caches in pool.map(run, names, devices):
            yield from caches
