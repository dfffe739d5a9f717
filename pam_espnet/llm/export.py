"""A trained LLM as a folder in Hugging Face's layout, with LoRA merged."""

from __future__ import annotations

from pathlib import Path

from pam_espnet.errors import ConfigError
from pam_espnet.fileio import whole_folder
from pam_espnet.llm.llm import LLM
from pam_espnet.llm.lora import merge_lora


def check_target(folder: Path) -> None:
    """Raises ConfigError: there is something already."""
    if folder.exists():
        raise ConfigError(f"{folder}: exists; name a new folder")


def export_llm(llm: LLM, folder: Path) -> None:
    """Write the LLM, whose LoRA is merged in place, its tokenizer, and the tokens that end an answer.

    Raises ConfigError: ``folder`` exists, an LLM in 4 bits, or one whose tied output layer has LoRA.
    """
    from transformers import GenerationConfig

    check_target(folder)
    lm = llm.lm
    if getattr(lm, "hf_quantizer", None) is not None:
        raise ConfigError("an LLM in 4 bits (llm_conf.quantize) cannot be exported")
    merge_lora(lm)
    lm.generation_config = GenerationConfig(  # no sampling options of the pretrained model: they are not this one's
        eos_token_id=list(llm.eos_ids), pad_token_id=llm.tokenizer.pad_token_id
    )
    with whole_folder(folder) as tmp:
        lm.save_pretrained(tmp)
        llm.tokenizer.save_pretrained(tmp)
