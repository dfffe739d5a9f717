"""The exported LLM is the trained one: transformers loads the folder and, fed with the model's embeddings, answers as
the model does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import write_exp

import pam_espnet
from pam_espnet.bin.pam_export import main
from pam_espnet.data.tasks import TASKS
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.errors import ConfigError
from pam_espnet.fileio import read_trained, save_trained

PROMPTS = [TASKS["caption"].default_prompt, TASKS["asr"].default_prompt]


@pytest.fixture(scope="module")
def trained(tiny_llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment, whose LoRA is not zero, as it begins."""
    exp = write_exp(tmp_path_factory.mktemp("trained"), tiny_llm_dir)
    state, draw = read_trained(exp / "model.safetensors"), torch.Generator().manual_seed(1)
    grown = {name: 0.2 * torch.randn(one.shape, generator=draw) for name, one in state.items() if "lora_B" in name}
    assert len(grown) == 2
    save_trained(state | grown, exp / "model.safetensors")
    return exp


@pytest.fixture(scope="module")
def speech(trained: Path) -> SpeechLLM:
    return pam_espnet.load(trained, options=trained / "decode.yaml")


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "merged"
    assert main(["--model", str(trained), "--vllm", str(folder)]) == 0
    return folder


def test_transformers_gives_the_same_logits_and_answers(speech: SpeechLLM, exported: Path, wave: np.ndarray) -> None:
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(exported)
    llm, waves = speech.model.decoder, [wave, wave[:8000]]
    inputs = speech.model.build_inputs(PROMPTS, speech.encode(waves, PROMPTS), None)
    for index, answer in enumerate(speech.answer(waves, PROMPTS)):
        embeds = inputs.embeds[index : index + 1, : int(inputs.prefix_lengths[index])]
        with torch.no_grad():
            logits = lm(inputs_embeds=embeds).logits
            expected = llm.logits(llm(embeds, torch.ones(embeds.shape[:2], dtype=torch.bool)))
            tokens = lm.generate(inputs_embeds=embeds, num_beams=2, max_new_tokens=6, do_sample=False)[0].tolist()
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        found = answer.tokens[0]
        assert tokens[: len(found)] == found and set(tokens[len(found) :]) <= set(llm.eos_ids)


def test_the_folder_is_that_of_a_plain_model(exported: Path, tiny_llm_dir: Path, speech: SpeechLLM) -> None:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, GenerationConfig

    weights, before = (load_file(path / "model.safetensors") for path in (exported, tiny_llm_dir))
    assert weights.keys() == before.keys()
    changed = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert changed == {f"model.layers.{block}.self_attn.q_proj.weight" for block in (0, 1)}
    chat = [{"role": "user", "content": "Hello"}]
    tokenizer = AutoTokenizer.from_pretrained(exported)
    expected = speech.model.decoder.tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == expected
    assert tuple(GenerationConfig.from_pretrained(exported).eos_token_id) == speech.model.decoder.eos_ids


def test_nothing_is_overwritten(trained: Path, exported: Path) -> None:
    with pytest.raises(ConfigError, match="exists; name a new folder"):
        main(["--model", str(trained), "--vllm", str(exported)])
