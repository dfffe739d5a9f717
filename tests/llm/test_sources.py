"""The precision that ``dtype: auto`` stands for."""

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pam_espnet.errors import ConfigError
from pam_espnet.llm.sources import choose_dtype, cpu_prefers_bfloat16


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu_prefers_bfloat16.cache_clear()
    yield monkeypatch
    cpu_prefers_bfloat16.cache_clear()


@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16])
def test_auto_is_what_the_cpu_multiplies_faster(on_cpu: pytest.MonkeyPatch, faster: torch.dtype) -> None:
    """Bfloat16 instructions are there, but some processors are slow at them."""

    def linear(rows: Tensor, weight: Tensor) -> Tensor:
        assert rows.dtype == weight.dtype
        time.sleep(0.001 if rows.dtype == faster else 0.02)
        return rows

    on_cpu.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    on_cpu.setattr(torch.nn.functional, "linear", linear)
    assert choose_dtype("auto") == faster


def test_auto_is_float32_where_bfloat16_is_emulated(on_cpu: pytest.MonkeyPatch) -> None:
    on_cpu.setattr(torch.cpu, "get_capabilities", lambda: {})
    on_cpu.setattr(torch.nn.functional, "linear", None)  # not even tried
    assert choose_dtype("auto") == torch.float32


@pytest.mark.parametrize("native", [True, False])
def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert choose_dtype("auto") == (torch.bfloat16 if native else torch.float32)


def test_a_name_is_taken_at_its_word() -> None:
    assert choose_dtype("bfloat16") == torch.bfloat16 and choose_dtype("float32") == torch.float32
    with pytest.raises(ConfigError, match="'half'"):
        choose_dtype("half")
