"""The shared fixtures are what other tests take them for."""

from collections.abc import Callable
from pathlib import Path

import numpy as np


def test_tiny_llm_loads_and_renders_its_chat_template(tiny_llm_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llm_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_llm_dir)
    assert model.config.vocab_size == len(tokenizer) <= 300
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Describe the sounds."}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nDescribe the sounds.<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id in ids
    assert tokenizer("häß", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits
    assert logits.dtype == torch.float32 and logits.std() > 0.1


def test_tone(tone: Callable[..., np.ndarray]) -> None:
    wave = tone(0.5, 440)
    assert wave.shape == (8000,) and wave.dtype == np.float32
    assert np.abs(np.fft.rfft(wave)).argmax() == 220
