"""How often the host waits for the device in a training step: only where a line here says so.

The device is torch's "meta", whose values nobody can read: a step that tries fails.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from collated import PROMPTS, collated
from espnet2.torch_utils.device_funcs import to_device
from random_encoders import KINDS, SMALL, random_weights
from tiny_model import tiny_config
from torch import Tensor
from transformers import masking_utils

from pam_espnet.llm import llm as llm_module
from pam_espnet.model import build_model

ROUTER = "tolist"  # to which experts the router sent the utterances: asked before the encoders begin
POSITIONS = "positions"  # transformers: whether the LLM's positions are those of several texts in a row
MASK = "mask"  # transformers: whether wav2vec 2.0 and HuBERT need the mask that they are given


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read where it is known that something is read; all else fails there."""
    found: list[str] = []
    tolist, autocast = Tensor.tolist, torch.autocast

    def zeros(tensor: Tensor) -> Any:
        if not tensor.is_meta:
            return tolist(tensor)
        found.append(ROUTER)
        return [0] * len(tensor)

    def needless(mask: Tensor | None, *_: Any) -> bool:
        if mask is not None:
            found.append(MASK)
        return mask is None

    monkeypatch.setattr(Tensor, "tolist", zeros)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch, "autocast", lambda _, *given, **named: autocast("cpu", *given, **named))
    monkeypatch.setattr(llm_module, "needed_mask", lambda mask: None)  # as on CUDA
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: found.append(POSITIONS))
    monkeypatch.setattr(masking_utils, "_ignore_bidirectional_mask_sdpa", needless)
    return found


def step(config: dict[str, Any], sizes: list[int], losses: dict[str, bool]) -> None:
    """The forward and backward pass of a batch of clips of ``sizes`` samples; whether it has each of ``losses``."""
    model = build_model(config).to("meta").train()
    vector = torch.zeros(model.decoder.width, device="meta")
    model.decoder._prompt_vectors = dict.fromkeys(PROMPTS.values(), vector)  # a new wording is run once
    loss, stats, _ = model(**to_device(collated(model, sizes), "meta"))
    assert {name: stats.get(f"loss_{name}") is not None for name in losses} == losses
    loss.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_A" in name or "adapters" in name)


@pytest.mark.parametrize(
    ("fusion", "conf", "expected"),
    [
        ("pam", {}, [ROUTER, POSITIONS]),
        ("pam", {"gradient": "straight_through"}, [POSITIONS]),
        ("average", {}, [POSITIONS]),
    ],
)
def test_all_losses(
    tiny_llm_dir: Path, tmp_path: Path, reads: list[str], fusion: str, conf: dict[str, Any], expected: list[str]
) -> None:
    (tmp_path / "tokens").write_text("".join(f"{token}\n" for token in range(3, 290)))
    config = tiny_config(
        tiny_llm_dir, fusion, router_loss_weight=0.1, exit_weight=0.3, exit_layers=[1], ctc_weight=0.1,
        ctc_posteriors=True, ctc_tokens=str(tmp_path / "tokens"),
    )  # fmt: skip
    config["frontend_conf"] |= {"mask_conf": {"span": 0.2, "dropout": 0.1}, "fusion_conf": conf}
    config["llm_conf"]["gradient_checkpointing"] = 2
    losses = {"asr": True, "count": True, "caption": False, "exit": True, "router": fusion == "pam", "ctc": True}
    step(config, [16000, 12000, 9000], losses)
    assert reads == expected


@pytest.mark.parametrize(
    ("sizes", "expected"), [([16000, 12000], [ROUTER, MASK, POSITIONS]), ([16000, 16000], [ROUTER, POSITIONS])]
)
def test_encoders_of_the_recipes(tiny_llm_dir: Path, reads: list[str], sizes: list[int], expected: list[str]) -> None:
    encoders = {kind: {"type": "whisper" if kind == "whisper" else "hf_wave", "path": kind} for kind in KINDS}
    config = tiny_config(tiny_llm_dir)
    config["frontend_conf"]["encoders"] = encoders
    with random_weights(SMALL, "cpu"):
        step(config, sizes, {"asr": True, "count": True})
    assert reads == expected
