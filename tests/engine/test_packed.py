"""Packed linear layers, alone and in the fused blocks: what they lose, and that rows do not see each other."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_search import EOS, LENGTHS, make_prefix, search
from torch.nn import functional as F

from pam_espnet.engine import packed
from pam_espnet.engine.engine import make_engine, self_check
from pam_espnet.engine.packed import pack
from pam_espnet.errors import ConfigError
from pam_espnet.llm.llm import LLM
from pam_espnet.search.hypothesis import BeamOptions

needs_int8 = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="int8 needs FBGEMM (x86)"
)


def make_rows(count: int) -> torch.Tensor:
    """(R,96) rows of very different size, one of them zero, one with an outlier."""
    rows = torch.randn(count, 96, generator=torch.Generator().manual_seed(1))
    rows = rows * torch.logspace(-3, 3, count)[:, None]
    rows[count // 2] = 0
    rows[-1, 5] = 1e5
    return rows


def make_layer(bias: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights (80,96) of channels of very different size, one of them zero."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(80, 96, generator=generator) * torch.logspace(-2, 1, 80)[:, None]
    weight[7] = 0
    return weight, torch.randn(80, generator=generator) if bias else None


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """What int8 makes of a matrix, as floats."""
    steps = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (weight / steps).round() * steps


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floats_are_multiplied_as_torch_does(dtype: torch.dtype, bias: bool) -> None:
    weight, shift = make_layer(bias)
    weight, shift = weight.to(dtype), None if shift is None else shift.to(dtype)
    for count in (1, 3, 33):
        x = torch.randn(count, 96, generator=torch.Generator().manual_seed(count)).to(dtype)
        found, expected = pack(weight, shift)(x), F.linear(x, weight, shift)
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        assert found.dtype == dtype and torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


@needs_int8
@pytest.mark.parametrize("bias", [True, False])
def test_int8_rounds_weights_and_hardly_anything_else(bias: bool) -> None:
    weight, shift = make_layer(bias)
    x = make_rows(33)
    found, exact = pack(weight, shift, int8=True)(x), F.linear(x.double(), rounded(weight).double())
    if shift is not None:
        found = found - shift
    sizes = x.norm(dim=1, keepdim=True) * weight.norm(dim=1)  # (R,O) what rounding of activations is measured by
    assert ((found - exact).abs() <= 2e-4 * sizes + 1e-5).all()
    assert ((found - F.linear(x, weight)).abs() <= 1e-2 * sizes + 1e-5).all()
    assert not torch.equal(rounded(weight), weight)


@needs_int8
def test_int8_is_exact_integer_arithmetic() -> None:
    """On every x86 CPU: those without VNNI add pairs of products in 16 bits, which must not saturate."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-127, 128, (64, 256), generator=generator).float()
    whole[:, 0] = 127  # a scale of 1
    x = torch.randint(-8001, 8002, (4, 256), generator=generator).float()
    x[0], x[1], x[2] = 8001, -8001, 63  # the largest sums
    exact = x.double() @ whole.double().T
    assert torch.allclose(packed.Int8(whole, None).product(x).double(), exact, rtol=1e-6, atol=1e-3)
    assert 2 * (packed.STEPS + packed.OFFSET) * packed.WEIGHT_STEPS <= 32767 and packed.STEPS <= packed.OFFSET


@needs_int8
def test_int8_is_exact_without_vnni() -> None:
    """FBGEMM held to AVX2, whose kernels add pairs of products in 16 bits."""
    test = f"{Path(__file__)}::test_int8_is_exact_integer_arithmetic"
    environment = {**os.environ, "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@needs_int8
def test_int8_rows_do_not_see_each_other() -> None:
    layer, rows = pack(*make_layer(), int8=True), make_rows(32)
    together = layer(rows)
    for count in (1, 3, 8):
        assert torch.equal(layer(rows[:count]), together[:count])
        assert torch.equal(layer(rows[-count:].flip(0)), together[-count:].flip(0))


def test_float_rows_hardly_see_each_other() -> None:
    layer, rows = pack(*make_layer()), make_rows(32)
    together = layer(rows)
    for count in (1, 3, 8):
        assert torch.allclose(layer(rows[:count]), together[:count], rtol=1e-5, atol=1e-6 * together.abs().max())


@needs_int8
def test_int8_takes_a_quarter_of_the_memory() -> None:
    weight, _ = make_layer()
    assert pack(weight, int8=True).nbytes == weight.nbytes // 4 + 4 * len(weight)
    assert pack(weight).nbytes == weight.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_table_gives_its_rows_back(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "PIECE", 16)
    weight = make_layer()[0].to(dtype)
    table = pack(weight, table=True)
    if not isinstance(table, packed.BlockedTable):
        pytest.skip("this machine packs no such weights")
    x = torch.randn(5, 96).to(dtype)
    assert torch.allclose(table(x), F.linear(x, weight), rtol=1e-2, atol=1e-2) and table.nbytes == weight.nbytes
    ids = torch.tensor([[79, 0, 15], [16, 16, 33]])
    assert torch.equal(table.rows(ids), weight[ids]) and table.rows(ids[:0]).shape == (0, 3, 96)


def test_int8_is_refused_where_there_is_no_kernel() -> None:
    with pytest.raises(ConfigError, match="x86"):
        pack(torch.ones(2, 2, device="meta"), int8=True)


# ---- in the engine --------------------------------------------------------------------------------------------------


def build(folder: Path, family: str = "Llama", lora: Any = None) -> LLM:
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    lm = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes)).eval()
    for parameter in lm.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    return LLM(lm, transformers.AutoTokenizer.from_pretrained(folder), lora=lora).eval()


@needs_int8
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_int8_blocks_are_exact_for_weights_that_are_whole_already(tiny_llm_dir: Path, family: str) -> None:
    """Whatever is left of the difference from transformers is rounded activations, not a slip."""
    llm = build(tiny_llm_dir, family)
    for module in llm.lm.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = rounded(module.weight.data)
    engine = make_engine(llm, int8=True)
    assert engine.precision == "int8" and self_check(engine) < 2e-3


@needs_int8
def test_int8_rounds_after_lora_is_merged(tiny_llm_dir: Path) -> None:
    llm = build(tiny_llm_dir, lora={"r": 2, "alpha": 4, "dropout": 0.0})
    for name, parameter in llm.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    assert self_check(make_engine(llm, int8=True)) < 0.05


@needs_int8
def test_rounding_that_breaks_an_llm_is_found_out(tiny_llm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "WEIGHT_STEPS", 1)
    with pytest.raises(ConfigError, match="dtype int8: rounded weights change"):
        make_engine(build(tiny_llm_dir), int8=True)


@needs_int8
def test_int8_hardly_changes_the_loss(tiny_llm_dir: Path) -> None:
    """Of 400 tokens, by at most 0.3 %."""
    llm = LLM.from_pretrained(str(tiny_llm_dir), dtype="float32").eval()
    tokens = torch.randint(3, llm.vocab_size, (40, 10), generator=torch.Generator().manual_seed(0))
    losses = []
    for int8 in (False, True):
        engine = make_engine(llm, int8=int8)
        logits, state = engine.prefill(llm.embed(tokens[:, :4]), torch.full((40,), 4))
        nll = []
        for at in range(4, 10):
            nll.append(F.cross_entropy(logits, tokens[:, at]))
            logits = engine.step(tokens[:, at], state)
        losses.append(float(torch.stack(nll).mean()))
    assert losses[1] == pytest.approx(losses[0], rel=3e-3)


def test_int8_through_transformers_is_refused(tiny_llm_dir: Path) -> None:
    llm = LLM.from_pretrained(str(tiny_llm_dir), dtype="float32", fused_decoding=False)
    with pytest.raises(ConfigError, match="fused_decoding"):
        make_engine(llm, int8=True)
    llm = LLM.from_pretrained(str(tiny_llm_dir), dtype="float32")
    llm.lm.config.hidden_act = "gelu"
    with pytest.raises(ConfigError, match="not Llama"):
        make_engine(llm, int8=True)


@needs_int8
@pytest.mark.parametrize("beam_size", [1, 4])
def test_int8_answers_do_not_depend_on_neighbours(tiny_llm_dir: Path, beam_size: int) -> None:
    engine = make_engine(LLM.from_pretrained(str(tiny_llm_dir), dtype="float32").eval(), int8=True)
    prefix = make_prefix()
    options = BeamOptions(beam_size=beam_size, nbest=beam_size, max_new_tokens=9, eos_ids=EOS)
    alone = [search(engine, prefix, [row], options)[0] for row in range(len(LENGTHS))]
    for rows in ([2, 0, 1], [5, 5, 4, 3], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0] * 5):
        for row, nbest in zip(rows, search(engine, prefix, rows, options), strict=True):
            assert [one.tokens for one in nbest] == [one.tokens for one in alone[row]]
            assert [one.score for one in nbest] == pytest.approx([one.score for one in alone[row]], abs=1e-4)
