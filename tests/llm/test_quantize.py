"""An LLM in 4 bits: close to the whole one, trained through LoRA, and decoded from plain matrices."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from services import unavailable
from tiny_model import tiny_config
from torch import Tensor

from pam_espnet.decode.options import AnswerOptions
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.errors import ConfigError
from pam_espnet.fileio import save_trained
from pam_espnet.llm.llm import LLM
from pam_espnet.llm.prompt_layout import answer_ids, build_inputs, lay_out, layout
from pam_espnet.llm.quantize import dequantize, elements
from pam_espnet.model import build_model
from pam_espnet.train.experiment import bare_llm

LORA = {"r": 2, "alpha": 4, "dropout": 0.0}


def test_what_cannot_be_is_refused_in_words(tiny_llm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tiny_llm_dir)
    with pytest.raises(ConfigError, match="choose nf4"):
        LLM.from_pretrained(path, quantize="int4")
    with pytest.raises(ConfigError, match="exclude each other"):
        bare_llm({"llm": path, "llm_conf": {"quantize": "nf4", "shard": "node"}})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"tools/setup\.sh --extras quantize"):
        LLM.from_pretrained(path, quantize="nf4")


@pytest.fixture
def kernels() -> Iterator[None]:
    if importlib.util.find_spec("bitsandbytes") is None:
        unavailable("bitsandbytes", "bitsandbytes is not installed: tools/setup.sh --extras quantize")
    import torch._dynamo

    with torch._dynamo.config.patch(disable=True):  # or its kernels for CPUs are compiled first
        yield


def step(llm: LLM) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt vector, losses and LoRA's gradients of a step."""
    vector = llm.prompt_vectors(["Describe the sounds."])
    part = layout(llm.tokenizer, "Describe the sounds.")
    audio = torch.randn(1, 7, llm.width, generator=torch.Generator().manual_seed(2))
    laid_out = lay_out([part], [audio.size(1)], [answer_ids(llm.tokenizer, "a dog barks")])
    nll = llm.token_losses(build_inputs(laid_out, audio, llm.embed)).nll
    trained = [p for p in llm.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(nll.mean(), trained)
    return vector, nll.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.services
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_that_of_the_rounded_weights(small_llm_dir: Path, checkpointing: bool) -> None:
    llms = []
    for quantize in (None, "nf4"):
        torch.manual_seed(0)
        options: dict[str, Any] = {"quantize": quantize, "gradient_checkpointing": checkpointing}
        llms.append(LLM.from_pretrained(str(small_llm_dir), LORA, "float32", **options))
        llms[-1].train().to(device="cpu", dtype=torch.float32)  # as ESPnet does
        for name, parameter in llms[-1].named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    whole, rounded = llms
    loss, close = step(whole)[1].mean(), step(rounded)
    held = sum(p.nbytes for p in rounded.transformer.layers.parameters() if p.dtype == torch.uint8)
    assert held == sum(p.numel() for p in whole.transformer.layers.parameters() if is_matrix(p)) / 2
    assert sum(map(elements, rounded.parameters())) == sum(map(elements, whole.parameters()))
    dequantize(rounded.lm)
    rounded._prompt_vectors.clear()
    assert not any(p.dtype == torch.uint8 for p in rounded.parameters())
    for one, other in zip(close, step(rounded), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert close[1].mean() == pytest.approx(float(loss), rel=0.1)
    for one, other in zip(whole.transformer.layers.parameters(), rounded.transformer.layers.parameters(), strict=True):
        if is_matrix(one):  # normal numbers
            assert 0.08 < float((one - other).norm() / one.norm()) < 0.1


def is_matrix(p: Tensor) -> bool:
    return not p.requires_grad and p.dim() > 1


@pytest.mark.services
@pytest.mark.usefixtures("kernels")
def test_rows_that_the_kernel_for_cpus_gets_wrong_are_refused(tiny_llm_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"multiple of 64 numbers, and those of .*q_proj have 32"):
        LLM.from_pretrained(str(tiny_llm_dir), quantize="nf4")


@pytest.mark.services
@pytest.mark.usefixtures("kernels")
def test_the_model_holds_what_was_trained_and_decodes_in_plain_matrices(small_llm_dir: Path, tmp_path: Path) -> None:
    config = tiny_config(small_llm_dir)
    config["llm_conf"]["quantize"] = "nf4"
    state = build_model(config).state_dict()
    assert any("lora_" in name for name in state) and not any("base_layer" in name for name in state)
    save_trained(state, tmp_path / "model.safetensors")
    model = SpeechLLM.load(tmp_path, AnswerOptions.from_dict({"max_new_tokens": 4}, "options"), config=config)
    assert type(model.engine).__name__ == "LlamaEngine"
    assert not any(p.dtype == torch.uint8 for p in model.model.parameters())
    assert len(model.answer([torch.randn(8000).numpy()], ["Describe the sounds."])) == 1
