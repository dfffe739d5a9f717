"""Blocks left out of a training step: the LLM without them, at their price, and whole again afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pam_espnet.llm.layer_dropout import blocks_skipped, skip_probabilities
from pam_espnet.llm.llm import LLMDecoder, TokenLosses
from pam_espnet.llm.prompt_layout import Placed, place

LORA = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": ["q_proj", "down_proj"]}
BLOCKS = 5


def build(folder: Path, checkpointing: bool) -> LLMDecoder:
    """The tiny LLM with five blocks that change something, and LoRA that does too."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers, config.initializer_range = BLOCKS, 0.2
    torch.manual_seed(4)
    lm = AutoModelForCausalLM.from_config(config).float()
    decoder = LLMDecoder(lm, AutoTokenizer.from_pretrained(folder), LORA, checkpointing)
    for name, parameter in decoder.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return decoder.train()


def batch(decoder: LLMDecoder) -> Placed:
    audio = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1))
    heads, tails = [torch.tensor([1, 5]), torch.tensor([1])], [torch.tensor([7]), torch.tensor([8, 9])]
    answers = [torch.tensor([20, 2]), torch.tensor([30, 31, 2])]
    return place(heads, audio, torch.tensor([4, 3]), tails, answers, decoder.embed)


def gradients(decoder: LLMDecoder, losses: TokenLosses) -> dict[str, torch.Tensor]:
    assert losses.exit_nll is not None
    (losses.nll.mean() + 0.3 * losses.exit_nll.mean()).backward()
    return {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_is_the_llm_without_those_blocks(tiny_llm_dir: Path, checkpointing: bool) -> None:
    decoder, short = build(tiny_llm_dir, checkpointing), build(tiny_llm_dir, checkpointing)
    kept = [0, 2, 4]
    short.transformer.layers = torch.nn.ModuleList(short.transformer.layers[index] for index in kept)
    run: list[int] = []  # the blocks whose weights are used, backward passes included
    for index, layer in enumerate(decoder.transformer.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: run.append(index))
    # the first pass that records hidden states is one that leaves blocks out: transformers then installs its hooks
    found = decoder.token_losses(batch(decoder), exit_layer=3, skipped=[2, 4])
    expected = short.token_losses(batch(short), exit_layer=2)
    assert torch.equal(found.nll, expected.nll) and torch.equal(found.exit_nll, expected.exit_nll)
    grads, wanted = gradients(decoder, found), gradients(short, expected)
    assert sorted(set(run)) == kept
    assert len(grads) == len(wanted) == 4 * len(kept)  # none for the others
    for name, grad in wanted.items():
        at = name.split(".")
        at[3] = str(kept[int(at[3])])
        assert torch.allclose(grads[".".join(at)], grad), name


def test_it_is_whole_again_afterwards(tiny_llm_dir: Path) -> None:
    decoder, untouched = build(tiny_llm_dir, False), build(tiny_llm_dir, False)
    decoder.token_losses(batch(decoder), exit_layer=1, skipped=[2, 3, 4])
    with pytest.raises(KeyError), blocks_skipped(decoder.transformer, [1, 3]):
        raise KeyError
    placed, same = batch(decoder), batch(untouched)
    assert torch.equal(decoder(placed.embeds, placed.mask), untouched(same.embeds, same.mask))


def test_deeper_blocks_are_left_out_more_often() -> None:
    rates = skip_probabilities(30, 0.2).tolist()
    assert rates[0] == 0 and rates[-1] == 0 and rates[:-1] == sorted(rates[:-1])
    assert 0.18 < rates[-2] < 0.2
    assert rates[14] < 0.5 * rates[28]  # the curve is convex: early blocks are spared
    assert skip_probabilities(1, 0.5).tolist() == [0.0]
