"""Shared fixtures: one thread, no network, and tiny random models of the real classes.

Heavy imports stay inside the fixtures, so that collecting or running a shell test costs no torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from locked_folder import locked

if TYPE_CHECKING:
    import numpy as np
    from model_hub import ModelHub

# Before torch is imported anywhere: two busy threads on a shared machine can be a hundred times slower than one.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")
# On CPUs with AMX, bfloat16 convolutions with at most 8 channels a group are wrong (torch 2.14.1, Conv1d(32, 32, 16,
# groups=4): 1.09 of the result's size; the 48 channels of real wav2vec 2.0 are right). Tiny models have so few.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

REPO_ROOT = Path(__file__).resolve().parents[1]
LONGEST = "test_mini_recipe.py"


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    """Keep torch at one thread, also in tests that imported it before or changed the number."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order in which two workers take files: the longest, those with slow tests, those that need downloads, others.

    So no worker begins something long when the other has no work left, and one tests while the other fetches.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    fetching = {item.path for item in items if "mini_models" in getattr(item, "fixturenames", ())}

    def rank(item: pytest.Item) -> int:
        if item.path not in slow | fetching:
            return 3
        return 0 if item.path.name == LONGEST else 1 + (item.path in fetching)

    items.sort(key=rank)


@pytest.fixture(scope="session")
def mini_models() -> Path:
    """The mini recipe's converted models; its packages are fetched on first use, so only slow tests may ask.

    They stay in the checkout's ``downloads``, the only folder beside temporary ones that tests write to.
    """
    recipe = REPO_ROOT / "egs" / "mini" / "pam1"
    with locked(recipe / "downloads") as downloads:
        for script in ("download.py", "models.py"):
            command = [sys.executable, f"local/{script}", "--downloads", "downloads"]
            environment = {**os.environ, "TQDM_MININTERVAL": "60"}
            done = subprocess.run(command, cwd=recipe, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return downloads / "models"


@pytest.fixture
def hub() -> Iterator[ModelHub]:
    """A server on loopback that speaks as the Hugging Face hub."""
    from hub_server import running
    from model_hub import ModelHub

    with running(ModelHub()) as server:
        yield server


@pytest.fixture
def hub_client(hub: ModelHub, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """huggingface_hub in this process as a client of ``hub``, with an empty cache and no token."""
    from model_hub import in_this_process

    with in_this_process(hub, tmp_path / "cache") as patch:
        yield patch


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the checkout."""
    return REPO_ROOT


@pytest.fixture(scope="session")
def tiny_llm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a random LlamaForCausalLM (2 layers, width 32) and its own tokenizer.

    The tokenizer is a byte-level BPE of at most 300 entries with the ChatML turn marks as special tokens
    (``<|im_end|>`` ends an answer, ``<|endoftext|>`` is the padding). Weights are float32 with a fixed seed, the
    input and output embeddings are tied, as in small real models. Tests share the folder: do not write into it.
    """
    import torch
    from tiny_tokenizer import tiny_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("models") / "tiny-llm"
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(path)

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        # Larger than the default 0.02: with it, the logits of a model this narrow are nearly flat.
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def small_llm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama (2 blocks, width 512), whose rows in 4 bits are whole blocks of weights with one
    scale, and a tokenizer. Tests share the folder: do not write into it."""
    from random_llm import random_lm
    from tiny_tokenizer import tiny_tokenizer

    path = tmp_path_factory.mktemp("models") / "small-llm"
    random_lm("small-llama", blocks=2).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tone() -> Callable[..., np.ndarray]:
    """``tone(seconds, hz, sample_rate=16000) -> (N,)``: a sine at half of full scale, float32 in [-1, 1]."""
    import numpy as np

    def make(seconds: float, hz: float, sample_rate: int = 16000) -> np.ndarray:
        times = np.arange(round(seconds * sample_rate)) / sample_rate
        return (0.5 * np.sin(2 * np.pi * hz * times)).astype(np.float32)

    return make
