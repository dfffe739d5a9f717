"""Cached hidden states of a configured encoder: the cache's key, and how one utterance is encoded for it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pam_espnet.data.feature_cache import FeatureCache, Share, cache_features
from pam_espnet.errors import ConfigError
from pam_espnet.fileio import exclusive, write_json
from pam_espnet.frontend.encoder_spec import EncoderSpec
from pam_espnet.frontend.encoders.base import layer_dtype
from pam_espnet.frontend.encoders.registry import build_encoder
from pam_espnet.processes import gathered


def cache_encoder(
    name: str,
    device: str,
    frontend_conf: Mapping[str, Any],
    data_dirs: Sequence[str | Path],
    root: Path,
    rebuild: bool,
) -> list[FeatureCache]:
    """Cache the hidden states of encoder ``name`` over each data directory under ``root/<name>/<set>``.

    Also writes ``root/<name>/spec.json``, with which training uses the cache without loading the encoder. The processes
    of torch.distributed's group, where there is one, share the utterances.

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

    caches, share = [], _share()
    for data_dir in data_dirs:
        out = root / name / Path(data_dir).name
        with exclusive(out / ".lock") if share.rank == 0 else nullcontext():
            caches.append(cache_features(encode, key, data_dir, out, rebuild=rebuild, share=share))
    if share.rank == 0:
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
) -> Iterator[FeatureCache]:
    """Cache the hidden states of several encoders, one after another. Raises as ``cache_encoder``."""
    for name in names:
        yield from cache_encoder(name, device, frontend_conf, data_dirs, root, rebuild)


def _share() -> Share:
    """Of a process in torch.distributed's group; all utterances where there is none."""
    if not dist.is_initialized():
        return Share()
    return Share(dist.get_rank(), dist.get_world_size(), gathered)
