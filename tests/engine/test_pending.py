"""Rows that leave early and are completed later remember and say what the whole LLM does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pam_espnet.engine import stepping
from pam_espnet.engine.pending import Nodes, Pending


class Dice:
    """Leaves at random, utterance by utterance; a third of the steps go to the last block."""

    deferred = True
    layers = (1, 2, 3)

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def begin(self, utterances: int, device: torch.device) -> None:
        self.depths = torch.tensor([1, 2, 3, 4, 4])[torch.randint(5, (utterances,), generator=self.generator)]

    def leave(self, layer: int, utterances: Tensor, hidden: Tensor) -> Tensor:
        return self.depths[utterances] == layer

    def spoken(self, layer: int, hidden: Tensor) -> Tensor:
        return hidden


def test_completed_rows_say_and_remember_what_the_whole_llm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams fork and die, memory is compacted, an utterance leaves; plain steps on the same tokens are compared."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(stepping, "RESERVE", 3)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    lm = LlamaForCausalLM(config).eval()
    fused = stepping.fuse(lm)
    assert fused is not None
    lengths, generator = torch.tensor([5, 9, 2]), torch.Generator().manual_seed(3)
    prefix = torch.randn(3, 9, 32, generator=generator)
    plain, waiting = (stepping.prefill(lm, fused, prefix, lengths)[1] for _ in range(2))
    waiting.policy = Dice()  # type: ignore[attr-defined]
    path = torch.zeros(3, 0, 32)  # what plain steps said, of each row and its ancestors
    full = corrected = longest = 0
    rows = torch.arange(3).repeat_interleave(4)
    for step in range(45):
        for state in (plain, waiting):
            state.select(rows)
        path = path[rows]
        embeds = torch.randn(len(rows), 32, generator=generator)
        expected, found = plain.step(embeds), waiting.step(embeds)
        path = torch.cat([path, expected[:, None]], dim=1)
        whole = waiting.depths == 4
        assert torch.allclose(found[whole], expected[whole], atol=1e-4)
        full += int(whole.sum())
        if step % 10 == 9:
            waiting.finish(torch.tensor([True, False, True][: len(waiting.keys[0])]))
        where, back, hidden = waiting.completed()
        assert torch.allclose(hidden, path[where, path.shape[1] - 1 - back], atol=1e-4)
        corrected += len(where)
        longest = max(longest, int(back.max()) if len(back) else 0)
        count = len(plain.keys[0]) - (step == 30)  # the last utterance is done
        parents = torch.randint(0, 4, (count, 2), generator=generator).repeat_interleave(2, dim=1)
        rows = (parents + 4 * torch.arange(count)[:, None]).flatten()
    assert full > 100 and corrected > 100 and longest > 3
    assert waiting.used == plain.used < 9 + 45 * 4  # compacted
    waiting.finish(torch.ones(2, dtype=torch.bool))
    assert not waiting.pending.at


def test_who_waits_is_taken_once_and_by_its_own_utterance() -> None:
    pending = Pending()
    owners, slots, rows = torch.tensor([0, 1, 1]), torch.tensor([4, 4, 5]), torch.tensor([0, 1, 2])
    pending.add(2, Nodes(torch.eye(3), owners, slots, rows, torch.ones(3, dtype=torch.bool)))
    assert pending.take(1, torch.tensor([True, True])) is None
    assert pending.take(2, torch.tensor([False, False])) is None
    taken = pending.take(2, torch.tensor([False, True]))
    assert taken is not None and taken.slots.tolist() == [4, 5] and not taken.new.any()
    assert pending.take(2, torch.tensor([False, True])) is None
    visible = torch.zeros(1, 8, dtype=torch.bool)
    visible[0, 4] = True
    pending.follow(torch.tensor([0]), torch.tensor([0]), visible)
    assert pending.at[2].rows.tolist() == [0]
    pending.follow(torch.tensor([0]), torch.tensor([0]), ~visible)
    assert not pending.at
