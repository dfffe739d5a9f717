"""The Llama engine against transformers, family by family; what is freed when it takes the LLM's weights."""

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pam_espnet.engine import llama, tree
from pam_espnet.engine.engine import Engine, TransformersEngine, make_engine, self_check
from pam_espnet.engine.exits import ExitOptions
from pam_espnet.engine.llama import LlamaEngine
from pam_espnet.engine.packed import BlockedTable, Plain
from pam_espnet.errors import PamError
from pam_espnet.llm.llm import LLM
from pam_espnet.search.beam import beam_search
from pam_espnet.search.hypothesis import BeamOptions

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
LENGTHS = torch.tensor([5, 9, 2])
LORA = {"r": 2, "alpha": 4, "dropout": 0.0}
Build = Callable[..., LLM]


@pytest.fixture(scope="module")
def build(tiny_llm_dir: Path) -> Build:
    """``build(family, lora=None, **options)``: a random LLM whose norms and biases are not ones and zeros."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llm_dir)

    def make(family: str, lora: Any = None, **options: Any) -> LLM:
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
        return LLM(model, tokenizer, lora=lora).eval()

    return make


def stir_lora(llm: LLM) -> None:
    """LoRA's second matrix starts at zero, where it changes nothing."""
    for name, parameter in llm.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)


def prefixes() -> Tensor:
    batch = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(1))
    for b, length in enumerate(LENGTHS.tolist()):
        batch[b, length:] = 1e4
    return batch


def both(llm: LLM) -> tuple[Engine, Engine]:
    engine = make_engine(llm)
    assert isinstance(engine, LlamaEngine)
    return engine, TransformersEngine(llm, None)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
        ("Llama", {"num_key_value_heads": 1, "head_dim": 16}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 8}),
    ],
)
def test_forks_and_drops_give_the_logits_of_transformers(build: Build, family: str, options: dict[str, Any]) -> None:
    engines = both(build(family, **options))
    found, expected = (engine.prefill(prefixes(), LENGTHS) for engine in engines)
    assert torch.allclose(found[0], expected[0], atol=1e-4)
    # one row per utterance becomes several, of unequal number; beams fork, end, are re-ordered; utterances finish
    for rows in ([0, 0, 1, 2, 2, 2], [1, 0, 2, 2, 5, 3], [0, 0, 4, 4], [3, 3, 2], [0, 2, 1], [2]):
        tokens = torch.arange(len(rows)) * 7 + len(rows)
        logits = []
        for engine, (_, state) in zip(engines, (found, expected), strict=True):
            state.select(rows)
            logits.append(engine.step(tokens, state))
        assert torch.allclose(*logits, atol=1e-4)
    assert len(found[1].keys[0]) == 1


def test_long_answers_outgrow_and_compact_the_memory(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "RESERVE", 3)
    engines = both(build("Llama"))
    states = [engine.prefill(prefixes(), LENGTHS)[1] for engine in engines]
    for state in states:
        state.select([0] * 4 + [1] * 4 + [2] * 4)
    generator = torch.Generator().manual_seed(3)
    slots = []
    for _ in range(60):
        tokens = torch.randint(0, 60, (12,), generator=generator)
        found, expected = (engine.step(tokens, state) for engine, state in zip(engines, states, strict=True))
        assert torch.allclose(found, expected, atol=1e-4)
        # a new beam of four from two of the old ones, as a search does
        parents = torch.cat([4 * b + torch.randint(0, 4, (2,), generator=generator).repeat(2) for b in range(3)])
        for state in states:
            state.select(parents.tolist())
        slots.append(states[0].used)
    assert max(slots) < 9 + 60 * 4 and any(later < earlier for earlier, later in itertools.pairwise(slots))


def test_lora_is_merged(build: Build) -> None:
    llm = build("Llama", LORA)
    plain = make_engine(llm).prefill(prefixes(), LENGTHS)[0]
    stir_lora(llm)
    found, expected = (engine.prefill(prefixes(), LENGTHS)[0] for engine in both(llm))
    assert torch.allclose(found, expected, atol=1e-4) and not torch.allclose(found, plain, atol=1e-2)


def test_half_precision_stays_close(build: Build) -> None:
    llm = build("Llama")
    llm.lm.to(torch.bfloat16)
    engine = make_engine(llm)
    assert isinstance(engine, LlamaEngine) and engine.precision == "bfloat16" and self_check(engine) < 0.03


def test_the_check_leaves_the_mode_alone_and_dropout_out(build: Build) -> None:
    llm = build("Llama", {**LORA, "dropout": 0.9})
    stir_lora(llm)
    llm.train()
    training = [module.training for module in llm.lm.modules()]
    assert isinstance(make_engine(llm), LlamaEngine)
    assert [module.training for module in llm.lm.modules()] == training and any(training)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {"hidden_act": "gelu"}),
        ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
        ("Mistral", {"sliding_window": 4}),
    ],
)
def test_what_is_not_of_this_kind_is_left_to_transformers(build: Build, family: str, options: dict[str, Any]) -> None:
    assert isinstance(make_engine(build(family, **options)), TransformersEngine)


def test_a_twist_that_is_not_known_is_found_out(
    build: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm, attend = build("Llama"), llama._causal
    layer = llm.transformer.layers[1].self_attn.o_proj
    weight = layer.weight
    layer.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    assert isinstance(make_engine(llm), TransformersEngine)  # quantised: its products are not this module's
    layer.weight = weight
    monkeypatch.setattr(llama, "_causal", lambda *args: 1.1 * attend(*args))
    with caplog.at_level(logging.WARNING):
        assert isinstance(make_engine(llm), TransformersEngine)
    assert "differ from transformers" in caplog.text


def test_drafted_tokens_follow_each_other(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token of a draft becomes a row, which continues or is dropped; dropped ones are dropped from the memory."""
    monkeypatch.setattr(llama, "RESERVE", 3)
    engine, reference = both(build("Qwen2"))
    _, state = engine.prefill(prefixes(), LENGTHS)
    generator = torch.Generator().manual_seed(5)
    rows: list[tuple[int, list[int]]] = [(b, []) for b in range(3)]  # utterance, its tokens so far
    slots = []
    for turn in range(40):
        sizes = torch.randint(1, 6, (len(rows),), generator=generator)
        drafts = [torch.randint(0, 60, (int(size),), generator=generator) for size in sizes]
        found = engine.verify(torch.cat(drafts), sizes.tolist(), state)
        pasts = [
            (b, [*past, *draft[: at + 1].tolist()])
            for (b, past), draft in zip(rows, drafts, strict=True)
            for at in range(len(draft))
        ]
        owners = torch.tensor([b for b, _ in pasts])
        # the second utterance continues with two of its rows, the first finishes in the end
        chosen = [int(torch.randint(0, len(pasts), (1,), generator=generator)) for _ in range(9)]
        kept = sorted(
            row
            for b in ({0, 1, 2} if turn < 30 else {1, 2})
            for row in [row for row in chosen if owners[row] == b][: 1 + (b == 1)] or [int((owners == b).nonzero()[0])]
        )
        for row in kept:
            utterance, past = pasts[row]
            whole = torch.cat([prefixes()[utterance, : LENGTHS[utterance]], engine.llm.embed(torch.tensor(past))])[None]
            expected, _ = reference.prefill(whole, torch.tensor([whole.shape[1]]))
            assert torch.allclose(found[row], expected[0], atol=1e-4)
        state.select(kept)
        rows = [pasts[row] for row in kept]
        slots.append(state.used)
    assert len(state.keys[0]) == 2 and any(later < earlier for earlier, later in itertools.pairwise(slots))


@pytest.mark.parametrize("drafts", [[[], [], []], [[3, 4], [5] * 8, [6]]])
def test_drafts_are_read_with_the_prefix(build: Build, drafts: list[list[int]]) -> None:
    engine, reference = both(build("Llama"))
    found, state = engine.prefill(prefixes(), LENGTHS, drafts)
    rows = [
        torch.cat([prefixes()[b, : LENGTHS[b]], engine.llm.embed(torch.tensor(draft[:count], dtype=torch.long))])[None]
        for b, draft in enumerate(drafts)
        for count in range(len(draft) + 1)
    ]
    parts = [reference.prefill(row, torch.tensor([row.shape[1]])) for row in rows]
    assert torch.allclose(found, torch.cat([logits for logits, _ in parts]), atol=1e-4)
    tokens = torch.arange(len(rows)) * 3 + 1
    expected = torch.cat(
        [reference.step(token[None], part_state) for token, (_, part_state) in zip(tokens, parts, strict=True)]
    )
    assert torch.allclose(engine.step(tokens, state), expected, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_stepping_equals_the_whole_sequence(tiny_llm_dir: Path, attention: str) -> None:
    """Prefixes of unequal length; rows copied, re-ordered and dropped on the way."""
    for fused in (True, False):
        llm = LLM.from_pretrained(str(tiny_llm_dir), dtype="float32", attention=attention, fused_decoding=fused).eval()
        engine = make_engine(llm)
        _, state = engine.prefill(prefixes(), LENGTHS)
        history: list[tuple[int, list[int]]] = [(b, []) for b in range(3)]
        for rows in ([0, 1, 2], [0, 0, 1, 1, 2, 2], [3, 2, 0, 5], [1, 1, 3]):
            state.select(rows)
            tokens = [(7 * i + len(rows)) % 300 for i in range(len(rows))]
            history = [(history[row][0], [*history[row][1], token]) for row, token in zip(rows, tokens, strict=True)]
            logits = engine.step(torch.tensor(tokens), state)
            for row, (b, past) in enumerate(history):
                embeds = torch.cat([prefixes()[b, : LENGTHS[b]], llm.embed(torch.tensor(past))])[None]
                with torch.no_grad():
                    torch.testing.assert_close(logits[row], llm.lm(inputs_embeds=embeds).logits[0, -1])


# ---- taking over the LLM's weights ----------------------------------------------------------------------------------


def held(llm: LLM, engine: LlamaEngine) -> int:
    """Bytes of weights of both."""
    packed = [one for block in engine.blocks for one in (block.qkv, block.out, block.gate_up, block.down)]
    return sum(p.nbytes for p in llm.parameters()) + sum(one.nbytes for one in [*packed, engine.output])


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_held_once(build: Build, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    """At most 2 % more than the LLM alone; answers, embeddings and known prompts stay the same."""
    monkeypatch.setattr("pam_espnet.engine.packed.PIECE", 16)
    llm = build("Llama", tie_word_embeddings=tied, vocab_size=300)
    alone = sum(p.nbytes for p in llm.parameters())
    ids = torch.tensor([[3, 59, 16], [3, 0, 15]])
    vector, embedded = llm.prompt_vector("Describe the sounds."), llm.embed(ids)
    engine = make_engine(llm)
    assert isinstance(engine, LlamaEngine)
    if isinstance(engine.output, Plain):
        pytest.skip("this machine packs no such weights")
    options = BeamOptions(beam_size=3, nbest=3, max_new_tokens=8)
    before = beam_search(engine, prefixes(), LENGTHS, options)
    engine.take_over()
    assert isinstance(engine.output, BlockedTable) == tied
    assert held(llm, engine) <= 1.02 * alone
    assert beam_search(engine, prefixes(), LENGTHS, options) == before
    assert torch.equal(llm.embed(ids), embedded) and torch.equal(llm.prompt_vector("Describe the sounds."), vector)
    with pytest.raises(PamError, match="load the experiment again"):
        llm.prompt_vector("Who speaks?")
    with pytest.raises(PamError, match="load the experiment again"):
        llm(prefixes(), torch.ones(3, 9, dtype=torch.bool))


def test_a_vocabulary_is_cut_from_the_packed_layer(build: Build) -> None:
    llm = build("Llama", tie_word_embeddings=True)
    whole, narrow = make_engine(llm), make_engine(llm, [7, 9, 30])
    wanted = whole.prefill(prefixes(), LENGTHS)[0][:, narrow.ids]
    narrow.take_over()
    assert narrow.ids is not None and narrow.ids.tolist() == sorted({7, 9, 30, *llm.eos_ids})
    assert torch.allclose(narrow.prefill(prefixes(), LENGTHS)[0], wanted, atol=1e-4)


def test_exits_must_be_known_before_the_weights_are_freed(build: Build) -> None:
    exits, options = ExitOptions("fixed", (1,)), BeamOptions(beam_size=2, max_new_tokens=5)
    engine = make_engine(build("Llama"))
    early = engine.with_exits(exits)
    expected = beam_search(early, prefixes(), LENGTHS, options)
    early.take_over()
    assert beam_search(engine.with_exits(exits), prefixes(), LENGTHS, options) == expected
    other = make_engine(build("Llama"))
    other.take_over()
    with pytest.raises(PamError, match="early exit"):
        other.with_exits(exits)


def test_transformers_keeps_its_weights(tiny_llm_dir: Path) -> None:
    llm = LLM.from_pretrained(str(tiny_llm_dir), dtype="float32", fused_decoding=False)
    make_engine(llm).take_over()
    assert all(p.numel() for p in llm.parameters()) and llm.prompt_vector("Hi").shape == (32,)


def test_growth_of_the_memory(build: Build) -> None:
    """The reserve behind the prefix is used up before anything is copied."""
    engine = make_engine(build("Llama"))
    _, state = engine.prefill(prefixes(), LENGTHS)
    assert state.keys[0].shape[2] == 9 + tree.RESERVE
    engine.step(torch.tensor([1, 2, 3]), state)
    assert state.used == 10 and state.keys[0].shape[2] == 9 + tree.RESERVE
