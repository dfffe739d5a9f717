"""LoRA through peft: low-rank updates beside the frozen weights of an LLM (Hu et al. 2021, arXiv 2106.09685)."""

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pam_espnet.config import check_number
from pam_espnet.errors import ConfigError

DEFAULTS: dict[str, Any] = {"r": 16, "alpha": 32, "dropout": 0.05, "target_modules": "all-linear"}


def add_lora(model: Any, options: Mapping[str, Any]) -> None:
    """Insert LoRA matrices into ``model`` in place; they are float32 and the only parameters that stay trainable.

    Args:
        model: a Hugging Face causal LM.
        options: r, alpha (the update is scaled by alpha / r), dropout (on the update's input), target_modules
            (a list of name endings, a regular expression, or "all-linear": all but the output layer).

    Raises ConfigError: an unknown option, one out of its range, or a name of target_modules that matches nothing.
    """
    from peft import LoraConfig, inject_adapter_in_model

    unknown = sorted(set(options) - set(DEFAULTS))
    if unknown:
        raise ConfigError(f"lora: unknown option(s) {', '.join(unknown)}; known: {', '.join(DEFAULTS)}")
    chosen = {**DEFAULTS, **options}
    rank, alpha, dropout, targets = (chosen[name] for name in ("r", "alpha", "dropout", "target_modules"))
    check_number(rank, "lora.r", at_least=1, whole=True)
    check_number(alpha, "lora.alpha", above=0)
    check_number(dropout, "lora.dropout", at_least=0, below=1)
    if not (isinstance(targets, str) or (isinstance(targets, list | tuple) and targets)):
        raise ConfigError(f"lora.target_modules: {targets!r}; must be a list of names, or one regular expression")
    if not isinstance(targets, str):  # peft is content when one of them matches
        ends = {name.split(".", start)[-1] for name, _ in model.named_modules() for start in range(name.count(".") + 1)}
        if missing := [name for name in targets if name not in ends]:
            linear = {name.split(".")[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
            raise ConfigError(
                f"lora.target_modules: the LLM has no module {', '.join(map(repr, missing))}; its linear layers are "
                f"{', '.join(sorted(linear))}"
            )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    try:
        inject_adapter_in_model(config, model)
    except (ValueError, re.error) as error:  # peft's answer to names that match no layer
        raise ConfigError(f"lora.target_modules: {error}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:  # peft follows the dtype of the base; small updates vanish in bfloat16
            parameter.data = parameter.data.to(torch.float32)
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            # Beside a half-precision base, inputs stay as they are and ``lora_precision`` casts the small matrices.
            module.cast_input_dtype_enabled = model.dtype == torch.float32


def lora_precision(model: Any) -> AbstractContextManager[Any]:
    """The context in which a model with LoRA is to be run: matrices are stored in float32, multiplied in the base's
    dtype, as usual in mixed precision. Widening the activations instead costs an eighth of a training step on a CPU.
    """
    return torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32)


@contextmanager
def lora_off(model: nn.Module) -> Iterator[None]:
    """Run the base model alone; a model without LoRA is left as it is."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    # peft also toggles requires_grad, which would thaw a LoRA that was frozen on purpose.
    trainable = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def set_lora_training(model: nn.Module, mode: bool) -> None:
    """Switch LoRA's own dropout on or off."""
    for name, module in model.named_modules():
        if name.endswith("lora_dropout"):
            module.train(mode)


def merged_weight(layer: Any) -> Tensor:
    """Weight of a linear layer with its LoRA, if it has one, rounded to the layer's dtype; without a copy if not."""
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    weight: Tensor = base.weight.detach()
    for name in getattr(layer, "active_adapters", ()):
        weight = (weight.float() + layer.get_delta_weight(name).detach().float()).to(weight.dtype)
    return weight


def merge_lora(model: Any) -> None:
    """Replace the layers of a Hugging Face causal LM that have LoRA by plain ones with merged weights, in place.
    Raises ConfigError: one is an output layer that is tied to the input embeddings."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if model.config.tie_word_embeddings and isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ConfigError("LoRA beside an output layer that is tied to the input embeddings cannot be merged")
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, BaseTunerLayer):
                plain: Any = layer.get_base_layer()
                plain.weight = nn.Parameter(merged_weight(layer), requires_grad=False)
                setattr(module, name, plain)
