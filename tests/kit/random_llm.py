"""LLMs of real shapes with random weights, and prefixes for them: nothing is downloaded.

B utterances, P prefix positions, D width, V vocabulary.
"""

from typing import Any

import torch
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor

from pam_espnet.llm.llm import LLM

# name -> family of transformers' classes; width, blocks, heads, key/value heads, head size, feed-forward width,
# vocabulary; whether the output layer is the embedding matrix
Row = tuple[str, tuple[int, int, int, int, int, int, int], bool]
SHAPES: dict[str, Row] = {
    "tiny-llama": ("Llama", (64, 3, 4, 2, 16, 96, 512), False),
    "tiny-qwen2": ("Qwen2", (64, 3, 4, 2, 16, 96, 512), True),
    "tiny-qwen3": ("Qwen3", (64, 3, 4, 4, 16, 96, 512), False),
    "small-llama": ("Llama", (512, 6, 8, 2, 64, 1024, 4096), False),
    "small-qwen2": ("Qwen2", (512, 6, 4, 2, 128, 1024, 4096), True),
    "small-qwen3": ("Qwen3", (512, 6, 4, 2, 128, 1024, 4096), False),
    "SmolLM2-135M": ("Llama", (576, 30, 9, 3, 64, 1536, 49152), True),
    "Llama-3.2-1B": ("Llama", (2048, 16, 32, 8, 64, 8192, 128256), True),
    "Qwen3-1.7B": ("Qwen3", (2048, 28, 16, 8, 128, 6144, 151936), True),
    "Qwen2.5-3B": ("Qwen2", (2048, 36, 16, 2, 128, 11008, 151936), True),
    "Llama-3.1-8B": ("Llama", (4096, 32, 32, 8, 128, 14336, 128256), False),
}


def random_lm(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, blocks: int = 0) -> Any:
    """A causal LM of transformers with a shape of ``SHAPES``; ``blocks`` of them, 0 for all.

    Probabilities are about as peaked as a trained LLM's: with flat ones ties would decide a search.
    """
    import transformers

    family, (width, depth, heads, kv_heads, head, network, vocabulary), tied = SHAPES[name]
    options: dict[str, Any] = {} if family == "Qwen2" else {"head_dim": head}
    if family.startswith("Qwen"):
        options["use_sliding_window"] = False
    deviation = min(0.25, 1.6 * width**-0.5)
    config = getattr(transformers, f"{family}Config")(
        hidden_size=width, num_hidden_layers=blocks or depth, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=network, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=8192,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=deviation, **options,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with torch.device(device):
            lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        with torch.no_grad():
            for parameter, one in lm.named_parameters():
                if parameter.endswith("bias"):
                    one.normal_(std=0.1)
                elif "norm" in parameter:
                    one.add_(0.1 * torch.randn_like(one))
            lm.model.norm.weight.mul_(3.0 / max(1.0, deviation * width**0.5))
    lm.generation_config.eos_token_id, lm.generation_config.pad_token_id = 2, 0
    return lm.requires_grad_(False)


def random_llm(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, blocks: int = 0) -> LLM:
    """The same as an ``LLM``, with a tokenizer of 300 entries."""
    return LLM(random_lm(name, device, dtype, blocks), tiny_tokenizer()).eval()


def random_prefix(llm: Any, lengths: list[int], seed: int = 1) -> tuple[Tensor, Tensor]:
    """Embeddings (B,P,D) of ``lengths`` and these as (B,); each row depends on its index and length alone.

    What lies behind an utterance's own positions is poisoned.
    """
    table = llm.lm.get_input_embeddings().weight
    spread = float(table[:512].float().std())
    batch = torch.full((len(lengths), max(lengths), table.shape[1]), 1e4)
    for index, (row, length) in enumerate(zip(batch, lengths, strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        row[:length] = spread * torch.randn(length, table.shape[1], generator=generator)
    return batch.to(table.device, table.dtype), torch.tensor(lengths, device=table.device)
