"""A whole tiny experiment for tests: configuration, formatted data, feature-free training arguments."""

from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from pam_espnet.data.datadir import DataDir
from pam_espnet.data.format import format_data_dir
from pam_espnet.data.tasks import TASKS

TEXTS = {"asr": "you have", "count": "2", "caption": "a dog barks"}


def tiny_config(llm: Path, fusion: str = "pam", **model_conf: Any) -> dict[str, Any]:
    """Two tiny encoders, a tiny LLM with LoRA."""
    encoders = {
        "one": {"type": "tiny_encoder:TinyEncoder", "path": "", "seed": 1},
        "two": {"type": "tiny_encoder:TinyEncoder", "path": "", "seed": 2},
    }
    conf = {"encoder": "one"} if fusion == "single" else {}
    return {
        "llm": str(llm),
        "llm_conf": {"dtype": "float32", "lora": {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj"]}},
        "frontend_conf": {"encoders": encoders, "fusion": fusion, "fusion_conf": conf, "frame_rate": 12.5},
        "model_conf": {"extract_feats_in_collect_stats": False, **model_conf},
    }


def write_exp(path: Path, llm: Path, ctc: bool = False, **more: Any) -> Path:
    """An experiment of random weights in the folder ``path``, with options of decoding in its ``decode.yaml``.

    ``ctc``: with a CTC head for tokens 3 to 249, of which token t is class t - 2; ``more``: of the configuration.
    """
    import torch

    from pam_espnet.config import write_config
    from pam_espnet.fileio import save_trained
    from pam_espnet.model import build_model

    conf: dict[str, Any] = {}
    if ctc:
        tokens = path / "ctc_tokens.txt"
        tokens.write_text("".join(f"{token}\n" for token in range(3, 250)))
        conf = {"ctc_tokens": str(tokens), "ctc_weight": 0.1}
    config = tiny_config(llm, **conf) | more
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_trained(build_model(config).state_dict(), path / "model.safetensors")
    write_config(config, path / "config.yaml")
    write_config({"beam_size": 2, "max_new_tokens": 6, "answer_sets": {"count": ["0", "1"]}}, path / "decode.yaml")
    return path


def deeper_llm(llm: Path, path: Path, blocks: int) -> Path:
    """The tiny LLM of folder ``llm`` with ``blocks`` blocks and other weights, saved to ``path``."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(llm)
    config.num_hidden_layers = blocks
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(llm).save_pretrained(path)
    return path


def write_data(root: Path, name: str, size: int = 6, seed: int = 0) -> Path:
    """``<root>/data/<name>`` with ``size`` noisy tones per task, formatted into ``<root>/dump/<name>``."""
    rng = np.random.default_rng(seed)
    source = root / "data" / name
    (source / "wav").mkdir(parents=True)
    tables: dict[str, dict[str, str]] = {key: {} for key in ("wav", "text", "prompt", "utt2task", "utt2spk")}
    for task in TEXTS:
        for i in range(size):
            utt = f"{task}-{name}-{i:03d}"
            samples = int(16000 * (0.6 + 0.1 * i))
            wave = 0.3 * np.sin(np.arange(samples) * 0.02 * (i + 1)) + 0.02 * rng.standard_normal(samples)
            path = source / "wav" / f"{utt}.wav"
            soundfile.write(path, wave.astype(np.float32), 16000, subtype="PCM_16")
            tables["wav"][utt] = str(path)
            tables["text"][utt] = TEXTS[task]
            tables["prompt"][utt] = TASKS[task].default_prompt
            tables["utt2task"][utt] = task
            tables["utt2spk"][utt] = utt
    DataDir(path=source, **tables).save()
    target = root / "dump" / name
    format_data_dir(source, target)
    return target


def train_args(root: Path, config: Path, output: Path, features: Path | None = None) -> list[str]:
    """Arguments of pam_train for data written by ``write_data`` as "train" and "dev"; ``features``: a cache's root."""
    args = ["--train", str(root / "dump/train"), "--valid", str(root / "dump/dev"), "--exp", str(output)]
    args += ["--config", str(config), "--num_workers", "0"]
    return args if features is None else [*args, "--feats", str(features)]
