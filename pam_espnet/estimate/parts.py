"""The parts of a configured model without their weights: shapes on torch's meta device, from each model's config.json.

They are built by the code that builds the real ones, so their parameter counts are exact. Converted models (YAMNet,
pyannote, GE2E) and encoders of a user's own know their shapes from their weights only, and are loaded; they are small.
A part whose configuration cannot be had (no network, never fetched) is reported as unknown, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from pam_espnet.config import used_encoders
from pam_espnet.errors import PamError
from pam_espnet.frontend.encoder_spec import EncoderSpec
from pam_espnet.frontend.encoders.base import AbsEncoder, without_weights
from pam_espnet.frontend.encoders.registry import build_encoder
from pam_espnet.frontend.frontend import PaMFrontend
from pam_espnet.llm.llm import choose_dtype, hub_source
from pam_espnet.llm.lora import add_lora


@dataclass(frozen=True)
class Part:
    """Parameters of one part of the model.

    Attributes:
        name: what the report calls it.
        frozen, trained: numbers of parameters.
        bytes: of all its parameters, as they are held in memory.
    """

    name: str
    frozen: int
    trained: int
    bytes: int


@dataclass(frozen=True)
class LLMShape:
    """What the formulas need of the LLM: numbers of its config.json and counts of its parameters."""

    blocks: int
    width: int
    inner_width: int  # of the feed-forward networks
    query_width: int  # heads times their width
    value_width: int  # the same of keys and values
    heads: int
    vocab: int
    block_params: int  # in the blocks, without LoRA
    lora_params: int
    element_bytes: int
    fused_attention: bool  # False: the attention matrix is kept for the backward pass


@dataclass
class ModelParts:
    """All parts; ``unknown`` has a line for each that could not be built."""

    parts: list[Part] = field(default_factory=list)
    llm: LLMShape | None = None
    encoders: dict[str, AbsEncoder] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def model_parts(config: Mapping[str, Any], cuda: bool) -> ModelParts:
    """Build every part of ``config`` without weights.

    Args:
        config: a resolved configuration (keys ``llm``, ``llm_conf``, ``frontend_conf``, ``model_conf``).
        cuda: whether a GPU will train; "auto" precision is bfloat16 there.

    Raises:
        ConfigError: no encoders, or keys that are no mappings.
    """
    found = ModelParts()
    lm = _try(found, f"llm: {config.get('llm')}", partial(_llm, config, cuda))
    width: int | None = None
    if lm is not None:
        width = lm.get_input_embeddings().weight.shape[1]
        found.llm = _shape(lm, config, cuda)
        found.parts += _split_lora(lm)
    frontend_conf = dict(config.get("frontend_conf") or {})
    names = used_encoders(config)
    for name in names:
        options = frontend_conf["encoders"][name]
        label = f"encoder {name}: {options.get('path', options.get('type'))}"
        encoder = _try(found, label, partial(_encoder, options))
        if encoder is not None:
            found.encoders[name] = encoder
            found.parts.append(_part(f"encoder {name}", encoder))
    missing = [*([] if width else ["the LLM"]), *(name for name in names if name not in found.encoders)]
    if missing or width is None:
        found.unknown.append(f"adapters and fusion (their widths depend on {', '.join(missing)})")
        return found
    specs = {name: EncoderSpec.of(name, encoder) for name, encoder in found.encoders.items()}
    frontend = _try(found, "adapters and fusion", partial(_frontend, frontend_conf, specs, width))
    if frontend is not None:
        adapters, fusion = _part("adapters", frontend.adapters), _part("fusion", frontend.fusion)
        found.parts += [adapters, Part("fusion and gain", fusion.frozen, fusion.trained + 1, fusion.bytes + 4)]
    if (config.get("model_conf") or {}).get("ctc_tokens"):
        found.parts.append(Part("CTC head", 0, width + 1, 4 * (width + 1)))  # blank and temperature
    return found


def _try(found: ModelParts, label: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except (PamError, OSError, ValueError, ImportError) as error:
        found.unknown.append(f"{label} ({' '.join(str(error).split())[:120]})")
        return None


def _llm(config: Mapping[str, Any], cuda: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    conf = dict(config.get("llm_conf") or {})
    source = hub_source(config["llm"], conf.get("revision"), conf.get("local_files_only", False))
    with torch.device("meta"):
        own = AutoConfig.from_pretrained(config["llm"], **source)
        lm = AutoModelForCausalLM.from_config(own, dtype=_dtype(conf, cuda)).requires_grad_(False)
        if conf.get("lora") is not None:
            add_lora(lm, conf["lora"])
    return lm


def _dtype(conf: Mapping[str, Any], cuda: bool) -> torch.dtype:
    name = conf.get("dtype", "auto")
    # The GPU is perhaps another machine's; those that train LLMs compute bfloat16.
    return torch.bfloat16 if name == "auto" and cuda else choose_dtype(name)


def _encoder(options: Mapping[str, Any]) -> AbsEncoder:
    with without_weights():
        return build_encoder(**options)


def _frontend(conf: Mapping[str, Any], specs: Mapping[str, EncoderSpec], width: int) -> PaMFrontend:
    with torch.device("meta"):
        return PaMFrontend(width=width, prompt_width=width, **{**conf, "specs": specs})


def _part(name: str, module: nn.Module) -> Part:
    sizes = [(p.numel(), p.requires_grad, p.element_size()) for p in module.parameters()]
    trained = sum(size for size, grad, _ in sizes if grad)
    frozen = sum(size for size, grad, _ in sizes if not grad)
    return Part(name, frozen, trained, sum(size * width for size, _, width in sizes))


def _split_lora(lm: nn.Module) -> list[Part]:
    whole = _part("LLM", lm)
    lora = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    if not lora:
        return [whole]
    return [Part("LLM", whole.frozen, 0, whole.bytes - 4 * lora), Part("LoRA", 0, lora, 4 * lora)]


def _shape(lm: Any, config: Mapping[str, Any], cuda: bool) -> LLMShape:
    own = lm.config
    heads = own.num_attention_heads
    head_width = getattr(own, "head_dim", None) or own.hidden_size // heads
    weight = lm.get_input_embeddings().weight
    outside = {id(lm.get_input_embeddings().weight), id(lm.get_output_embeddings().weight)}
    attention = (config.get("llm_conf") or {}).get("attention", "auto")
    return LLMShape(
        blocks=own.num_hidden_layers,
        width=own.hidden_size,
        inner_width=getattr(own, "intermediate_size", None) or 4 * own.hidden_size,
        query_width=heads * head_width,
        value_width=(getattr(own, "num_key_value_heads", None) or heads) * head_width,
        heads=heads,
        vocab=weight.shape[0],
        block_params=sum(p.numel() for p in lm.parameters() if not p.requires_grad and id(p) not in outside),
        lora_params=sum(p.numel() for p in lm.parameters() if p.requires_grad),
        element_bytes=weight.element_size(),
        fused_attention=attention != "eager" and (attention != "auto" or cuda or weight.element_size() == 4),
    )
