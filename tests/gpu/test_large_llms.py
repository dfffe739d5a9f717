"""What makes room for a large LLM on one GPU: blocks that stay on the host, weights in 4 bits."""

import importlib.util
from pathlib import Path

import pytest
import torch

from pam_espnet.llm.llm import LLM
from pam_espnet.llm.quantize import dequantize
from pam_espnet.llm.shard import stream_blocks


def test_streamed_blocks_are_on_the_device_for_their_pass_alone(small_llm_dir: Path, device: str) -> None:
    whole, streamed = (LLM.from_pretrained(str(small_llm_dir), {"r": 2}, "float32").eval() for _ in range(2))
    stream_blocks(streamed.lm, device)
    found, expected = streamed.to(device).prompt_vectors(["Hi"]), whole.to(device).prompt_vectors(["Hi"])
    assert torch.equal(found, expected) and streamed.device.type == torch.device(device).type
    assert {p.device.type for p in streamed.transformer.layers.parameters()} == {"cpu"}


def test_four_bits_are_those_of_plain_matrices(small_llm_dir: Path, device: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: tools/setup.sh --extras quantize")
    llm = LLM.from_pretrained(str(small_llm_dir), {"r": 2}, "float32", quantize="nf4").to(device).eval()
    embeds = torch.randn(1, 7, llm.width, device=device, requires_grad=True)
    mask = torch.ones(1, 7, dtype=torch.bool, device=device)
    rounded = llm(embeds, mask)
    (gradient,) = torch.autograd.grad(rounded.square().mean(), embeds)
    dequantize(llm.lm)
    plain = llm(embeds, mask)
    torch.testing.assert_close(plain, rounded, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(torch.autograd.grad(plain.square().mean(), embeds)[0], gradient, atol=1e-3, rtol=1e-3)
