"""The fused blocks and the tree of hypotheses against transformers, family by family."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from pam_espnet.engine import stepping
from pam_espnet.engine import tree as tree_module
from pam_espnet.engine.tree import tree_prefill
from pam_espnet.llm.lora import add_lora

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
LENGTHS = torch.tensor([5, 9, 2])


def build(family: str, **options: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[family]
    model = model_class(config_class(**{**SIZES, **options})).eval()
    for parameter in model.parameters():  # norms start at one and biases at zero, where a slip would not show
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def prefixes() -> Tensor:
    batch = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(1))
    for b, length in enumerate(LENGTHS.tolist()):
        batch[b, length:] = 1e4
    return batch


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 16}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 8}),
    ],
)
def test_forks_and_drops_give_the_logits_of_transformers(family: str, options: dict[str, Any]) -> None:
    lm = build(family, **options)
    fused = stepping.fuse(lm)
    assert fused is not None
    found, tree = stepping.prefill(lm, fused, prefixes(), LENGTHS)
    expected, cached = stepping.prefill(lm, None, prefixes(), LENGTHS)
    assert torch.allclose(found, expected, atol=1e-4)
    generator = torch.Generator().manual_seed(2)
    # one row per utterance becomes several, of unequal number; beams fork, die out, change places; utterances leave
    for rows in ([0, 0, 1, 2, 2, 2], [1, 0, 2, 2, 5, 3], [0, 0, 4, 4], [3, 3, 2], [0, 2, 1], [2]):
        for state in (tree, cached):
            state.select(torch.tensor(rows))
        embeds = torch.randn(len(rows), 32, generator=generator)
        assert torch.allclose(tree.step(embeds), cached.step(embeds), atol=1e-4)
    assert len(tree.keys[0]) == 1


def test_long_answers_outgrow_and_compact_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepping, "RESERVE", 3)
    lm = build("llama")
    fused = stepping.fuse(lm)
    _, tree = stepping.prefill(lm, fused, prefixes(), LENGTHS)
    _, cached = stepping.prefill(lm, None, prefixes(), LENGTHS)
    for state in (tree, cached):
        state.select(torch.arange(3).repeat_interleave(4))
    generator = torch.Generator().manual_seed(3)
    slots = []
    for _ in range(60):
        embeds = torch.randn(12, 32, generator=generator)
        assert torch.allclose(tree.step(embeds), cached.step(embeds), atol=1e-4)
        # a new beam of four from two of the old ones, as a search does
        parents = torch.cat([4 * b + torch.randint(0, 4, (2,), generator=generator).repeat(2) for b in range(3)])
        for state in (tree, cached):
            state.select(parents)
        slots.append(tree.used)
    assert max(slots) < 9 + 60 * 4 and any(later < earlier for earlier, later in itertools.pairwise(slots))


def test_lora_is_merged() -> None:
    lm = build("llama")
    add_lora(lm, {"r": 2, "alpha": 4, "dropout": 0.0})
    plain = stepping.prefill(lm, stepping.fuse(lm), prefixes(), LENGTHS)[0]
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    found, _ = stepping.prefill(lm, stepping.fuse(lm), prefixes(), LENGTHS)
    expected, _ = stepping.prefill(lm, None, prefixes(), LENGTHS)
    assert torch.allclose(found, expected, atol=1e-4) and not torch.allclose(found, plain, atol=1e-2)


def test_half_precision_stays_close() -> None:
    lm = build("llama").to(torch.bfloat16)
    fused = stepping.fuse(lm)
    assert fused is not None and stepping.self_check(fused, lm) < 0.03


def test_the_check_leaves_the_mode_alone_and_dropout_out() -> None:
    lm = build("llama")
    add_lora(lm, {"r": 2, "alpha": 4, "dropout": 0.9})
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    lm.train()
    assert stepping.fuse(lm) is not None
    assert all(module.training for module in lm.modules())


@pytest.mark.parametrize("options", [{"hidden_act": "gelu"}, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}])
def test_what_is_not_of_this_kind_is_left_to_transformers(options: dict[str, Any]) -> None:
    assert stepping.fuse(build("llama", **options)) is None
    assert stepping.fuse(build("mistral", sliding_window=4)) is None


def test_a_twist_that_is_not_known_is_found_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lm = build("llama")
    attend = tree_module._causal
    weight = lm.model.layers[1].self_attn.o_proj.weight
    assert stepping.fuse(lm) is not None
    lm.model.layers[1].self_attn.o_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    assert stepping.fuse(lm) is None  # quantised: its products are not this module's
    lm.model.layers[1].self_attn.o_proj.weight = weight
    monkeypatch.setattr(tree_module, "_causal", lambda *args: 1.1 * attend(*args))
    with caplog.at_level(logging.WARNING):
        assert stepping.fuse(lm) is None
    assert "differ from transformers" in caplog.text


def test_chains_are_tokens_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token of a chain becomes a row, which goes on or is dropped; what is dropped leaves the memory."""
    monkeypatch.setattr(stepping, "RESERVE", 3)
    lm = build("qwen2")
    _, tree = stepping.prefill(lm, stepping.fuse(lm), prefixes(), LENGTHS)
    generator = torch.Generator().manual_seed(5)
    rows: list[tuple[int, Tensor]] = [(b, torch.zeros(0, 32)) for b in range(3)]  # utterance, its tokens so far
    slots = []
    for turn in range(40):
        sizes = torch.randint(1, 6, (len(rows),), generator=generator)
        chains = [torch.randn(int(size), 32, generator=generator) for size in sizes]
        found = tree.chain(torch.cat(chains), sizes)
        pasts = [
            (b, torch.cat([past, chain[: at + 1]]))
            for (b, past), chain in zip(rows, chains, strict=True)
            for at in range(len(chain))
        ]
        owners = torch.tensor([b for b, _ in pasts])
        # the second utterance goes on with two of its rows, the first leaves in the end
        chosen = [int(torch.randint(0, len(pasts), (1,), generator=generator)) for _ in range(9)]
        kept = sorted(
            row
            for b in ({0, 1, 2} if turn < 30 else {1, 2})
            for row in [row for row in chosen if owners[row] == b][: 1 + (b == 1)] or [int((owners == b).nonzero()[0])]
        )
        for row in kept:
            utterance, past = pasts[row]
            whole = torch.cat([prefixes()[utterance, : LENGTHS[utterance]], past])[None]
            expected, _ = stepping.prefill(lm, None, whole, torch.tensor([whole.shape[1]]))
            assert torch.allclose(found[row], expected[0], atol=1e-4)
        tree.select(torch.tensor(kept))
        rows = [pasts[row] for row in kept]
        slots.append(tree.used)
    assert len(tree.keys[0]) == 2 and any(later < earlier for earlier, later in itertools.pairwise(slots))


@pytest.mark.parametrize("asked", [[1, 1, 1], [3, 9, 2]])
def test_several_positions_of_a_prefix_become_rows(asked: list[int]) -> None:
    lm = build("llama")
    found, tree = tree_prefill(stepping.fuse(lm), prefixes(), LENGTHS, 2, torch.tensor(asked))
    ends = [(b, int(LENGTHS[b]) - behind) for b in range(3) for behind in reversed(range(asked[b]))]
    parts = [stepping.prefill(lm, None, prefixes()[[b], :end], torch.tensor([end])) for b, end in ends]
    assert torch.allclose(found, torch.cat([hidden for hidden, _ in parts]), atol=1e-4)
    more = torch.randn(len(ends), 32)
    expected = torch.cat([state.step(row[None]) for (_, state), row in zip(parts, more, strict=True)])
    assert torch.allclose(tree.step(more), expected, atol=1e-4)
