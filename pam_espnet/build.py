"""From a resolved configuration to a model; used by training (through PaMTask) and by decoding alike.

Does not import ``espnet2.tasks``, whose import costs seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pam_espnet.data.tasks import TASKS
from pam_espnet.decoder.llm import LLMDecoder
from pam_espnet.errors import ConfigError
from pam_espnet.espnet_model import ESPnetPaMModel
from pam_espnet.frontend.ctc_head import EmbeddingCTC
from pam_espnet.frontend.frontend import PaMFrontend

# Keys of ``model_conf`` that ESPnet or the warm start read; the rest goes to ESPnetPaMModel.
_OTHER_READERS = ("extract_feats_in_collect_stats", "ctc_tokens")


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
    decoder = LLMDecoder.from_pretrained(config["llm"], **dict(config.get("llm_conf") or {}))
    frontend_conf = dict(config.get("frontend_conf") or {})
    try:
        frontend = PaMFrontend(width=decoder.width, prompt_width=decoder.width, **frontend_conf)
    except TypeError as error:
        raise ConfigError(f"config key 'frontend_conf': {error}") from error
    model_conf = dict(config.get("model_conf") or {})
    tokens = model_conf.get("ctc_tokens")
    options = {key: value for key, value in model_conf.items() if key not in _OTHER_READERS}
    ctc = None
    if tokens:
        token_ids = _read_token_ids(Path(tokens), decoder)
        ctc = EmbeddingCTC(token_ids, decoder.embed(torch.tensor(token_ids)))
    elif options.get("ctc_weight"):
        raise ConfigError("model_conf.ctc_weight needs model_conf.ctc_tokens (written by the warm start of stage 3)")
    try:
        model = ESPnetPaMModel(frontend=frontend, decoder=decoder, tasks=tuple(TASKS), ctc=ctc, **options)
    except TypeError as error:
        raise ConfigError(f"config key 'model_conf': {error}") from error
    trained = sum(p.numel() for p in model.trainable_parameters().values())
    total = sum(p.numel() for p in model.parameters())
    logging.info(f"model: {trained:,} trained of {total:,} parameters (frozen encoders not counted)")
    return model


def _read_token_ids(path: Path, decoder: LLMDecoder) -> list[int]:
    if not path.is_file():
        raise ConfigError(f"model_conf.ctc_tokens: no such file: {path}\n  -> run stage 3, which writes it")
    token_ids = [int(line) for line in path.read_text(encoding="utf-8").split()]
    beyond = [token for token in token_ids if not 0 <= token < decoder.vocab_size]
    if beyond:
        raise ConfigError(f"{path}: token ids {beyond[:5]} are outside the LLM's vocabulary: made with another LLM?")
    return token_ids
