"""Frozen weights of an LLM in 4 bits: NF4 of QLoRA (Dettmers et al., arXiv 2305.14314), through bitsandbytes.

Blocks of 64 weights share a scale, and 256 scales a second one: 4.13 bits per weight of the blocks' linear layers.
Embedding matrix, norms and output layer keep the LLM's precision, in which products are computed, too.
"""

from typing import Any

import torch
from torch import nn

from pam_espnet.errors import ConfigError

_BLOCK = 64  # weights with one scale
BITS = 4 + 8 / _BLOCK + 32 / (_BLOCK * 256)  # of a weight


def check_quantize(quantize: str | None, shard: str | None) -> None:
    """Raises ConfigError: a kind of weights that there is not, or one that cannot be sharded."""
    if quantize not in (None, "nf4"):
        raise ConfigError(f"llm_conf.quantize: {quantize!r}; choose nf4, or leave it out")
    if quantize and shard:
        raise ConfigError(
            "llm_conf: quantize and shard exclude each other: 4-bit weights are no matrices whose rows could be dealt "
            "out\n  -> leave out quantize, or shard"
        )


def loading_options(quantize: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Options of transformers' ``from_pretrained``, which rounds each matrix when it is read, on the GPU if there is
    one; the whole LLM is nowhere. Raises ConfigError: bitsandbytes is not installed."""
    if quantize is None:
        return {}
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "llm_conf.quantize: nf4 needs bitsandbytes, an extra\n  -> tools/setup.sh --extras quantize"
        ) from error
    rounding = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": rounding, "device_map": {"": device}}


def check_layers(lm: Any) -> None:
    """Make 4-bit layers on a CPU ready for training.
    Raises ConfigError: bitsandbytes computes other weights for one of them, as it was found to on CPUs."""
    for name, module in lm.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu") and module.weight.device.type == "cpu":
            if module.in_features % _BLOCK:
                raise ConfigError(
                    f"llm_conf.quantize: on a CPU a matrix needs rows of a multiple of {_BLOCK} numbers, and those of "
                    f"{name} have {module.in_features}\n  -> leave out quantize, or use a GPU"
                )
            module.support_avx512bf16_for_cpu = False  # packed weights, for inference: they have no backward pass


def dequantize(lm: Any) -> None:
    """Replace 4-bit layers, below LoRA too, by plain ones of the LLM's precision with the rounded weights, in place:
    decoding then needs no kernel for 4 bits, and as much memory as without rounding."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for module in list(lm.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, Linear4bit):
                plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
                packed: Any = layer.weight
                weight = dequantize_4bit(packed.data, packed.quant_state).to(lm.dtype)
                plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
                setattr(module, name, plain)


def elements(parameter: torch.Tensor) -> int:
    """How many numbers a parameter has; a byte holds two of 4 bits."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)
