"""Triton's kernels: what they compute, in the interpreter; what they are compiled to, for cards that are not here."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pam_espnet.engine.products import choose_tiles  # noqa: E402
from pam_espnet.engine.triton_kernels import product  # noqa: E402

CARDS = {"A100": (80, 163), "RTX 4090": (89, 99), "H100": (90, 227)}  # compute capability, KiB of shared memory
ALIGNED = ("*bf16", "*fp32", "i32")


def test_kernels_compute_what_their_twins_do() -> None:
    """In a process of its own: Triton reads the variable when it is imported."""
    script = Path(__file__).with_name("interpreted_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(script)]
    found = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, found.stdout + found.stderr


def compiled(kernel: Any, capability: int, constants: dict[str, int], types: dict[str, str], **options: int) -> Any:
    """``kernel`` as a card would run it: every pointer and size is aligned."""
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
    aligned = {(index,): [["tt.divisibility", 16]] for index, kind in enumerate(signature.values()) if kind in ALIGNED}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("card", CARDS)
def test_products_fit_the_card_and_use_the_same_instructions_for_any_number_of_rows(
    card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    capability, memory = CARDS[card]
    for rows in (4, 128):
        tiles = choose_tiles(rows, 2560, 2048, 2, memory * 1024)
        constants = {"WIDTH": tiles.width, "ROWS": tiles.rows, "DEPTH": tiles.depth, "PARTS": tiles.parts, "EVEN": True}
        types = {"x": "*bf16", "weight": "*bf16", **dict.fromkeys(("rows", "outputs", "inputs"), "i32")}
        made = compiled(product, capability, constants, types, num_warps=tiles.warps, num_stages=tiles.stages)
        assert made.metadata.shared <= memory * 1024
        wide, narrow = "wgmma.mma_async" in made.asm["ptx"], "mma.sync.aligned.m16n8k16" in made.asm["ptx"]
        assert wide == (card == "H100") and narrow != wide


def test_order_of_sums_does_not_depend_on_rows_and_tiles_fit_any_card() -> None:
    for outputs, inputs, size, memory in itertools.product((5, 2048, 22016), (37, 2048, 11008), (2, 4), (48, 99, 227)):
        tiles = [choose_tiles(rows, outputs, inputs, size, memory * 1024) for rows in (1, 16, 17, 64, 128, 4096)]
        assert len({(one.depth, one.parts) for one in tiles}) == 1
        for one in tiles:
            buffers = one.stages - (memory < 200)
            assert buffers >= 1 and buffers * (one.width + one.rows) * one.depth * size <= memory * 1024
            assert one.width % 64 == 0 and 1 <= one.parts <= max(1, inputs // 256)
