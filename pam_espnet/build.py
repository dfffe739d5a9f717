"""From a resolved configuration to a model; used by training (through PaMTask) and by decoding alike.

Does not import ``espnet2.tasks``, whose import costs seconds.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pam_espnet.config import check_options
from pam_espnet.data.tasks import TASKS
from pam_espnet.decoder.llm import LLMDecoder
from pam_espnet.errors import ConfigError
from pam_espnet.espnet_model import ESPnetPaMModel
from pam_espnet.frontend.ctc_head import EmbeddingCTC
from pam_espnet.frontend.frontend import PaMFrontend


def _model_options(ctc_tokens: str | None = None, extract_feats_in_collect_stats: bool = False) -> None:
    """Options of ``model_conf`` that are read here and by ESPnet; the rest goes to ESPnetPaMModel."""


def build_model(config: Mapping[str, Any]) -> ESPnetPaMModel:
    """Build the model that ``config`` describes, with its pretrained parts, untrained ones freshly initialised.

    Args:
        config: keys ``llm`` (folder or Hugging Face id), ``llm_conf``, ``frontend_conf``, ``model_conf``; the
            ``config.yaml`` of an experiment directory is such a mapping.

    Raises:
        ConfigError: unknown keys, missing model folders, values that cannot work.
    """
    if not config.get("llm"):
        raise ConfigError("config key 'llm' is missing: give the LLM's folder or its Hugging Face id")
    llm_conf, frontend_conf, model_conf = (
        dict(config.get(key) or {}) for key in ("llm_conf", "frontend_conf", "model_conf")
    )
    check_options(llm_conf, "llm_conf", LLMDecoder.from_pretrained, LLMDecoder)
    check_options(frontend_conf, "frontend_conf", PaMFrontend)
    check_options(model_conf, "model_conf", ESPnetPaMModel, _model_options)
    if missing := [name for name in ("encoders", "fusion") if name not in frontend_conf]:
        raise ConfigError(f"config key 'frontend_conf': {' and '.join(missing)} missing")
    decoder = LLMDecoder.from_pretrained(config["llm"], **llm_conf)
    frontend = PaMFrontend(width=decoder.width, prompt_width=decoder.width, **frontend_conf)
    tokens = model_conf.get("ctc_tokens")
    options = {k: v for k, v in model_conf.items() if k not in inspect.signature(_model_options).parameters}
    ctc = None
    if tokens:
        token_ids = _read_token_ids(Path(tokens), decoder)
        ctc = EmbeddingCTC(token_ids, decoder.embed(torch.tensor(token_ids)))
    elif options.get("ctc_weight"):
        raise ConfigError("model_conf.ctc_weight needs model_conf.ctc_tokens (written by the warm start of stage 3)")
    model = ESPnetPaMModel(frontend=frontend, decoder=decoder, tasks=tuple(TASKS), ctc=ctc, **options)
    trained = sum(p.numel() for p in model.trainable_parameters().values())
    total = sum(p.numel() for p in model.parameters())
    logging.info(f"model: {trained:,} trained of {total:,} parameters (frozen encoders not counted)")
    return model


def _read_token_ids(path: Path, decoder: LLMDecoder) -> list[int]:
    if not path.is_file():
        raise ConfigError(f"model_conf.ctc_tokens: no such file: {path}\n  -> run stage 3, which writes it")
    words = path.read_text(encoding="utf-8").split()
    if wrong := [word for word in words if not word.isdigit()]:
        raise ConfigError(f"{path}: {wrong[0]!r} is not a token id\n  -> remove the file; stage 3 writes it again")
    token_ids = [int(word) for word in words]
    beyond = [token for token in token_ids if not 0 <= token < decoder.vocab_size]
    if beyond:
        raise ConfigError(f"{path}: token ids {beyond[:5]} are outside the LLM's vocabulary: made with another LLM?")
    return token_ids
