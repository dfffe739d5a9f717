"""FENSE: similarity of sentence embeddings, less where a caption is not fluent.

Zhou et al., "Can Audio Captions Be Evaluated with Image Caption Metrics?" (ICASSP 2022). A caption's score is its mean
cosine similarity to the references (Sentence-BERT, mean over tokens); where the error detector is surer than 0.9 that
the sentence is broken, a tenth of it. What is needed lies in one folder (see ``metrics/parts.py``):

    sbert/                         paraphrase-TinyBERT-L6-v2, a Hugging Face folder
    detector/                      BERT's configuration and tokenizer, model.safetensors with the detector's weights

Dimension letters: B sentences, L tokens, D width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pam_espnet.score.parts import UnavailableError, find_part

THRESHOLD = 0.9  # probability of an error from which a sentence is taken for broken
PENALTY = 0.9  # of its score
DETECTOR_TOKENS = 64
SENTENCE_TOKENS = 128
BATCH = 64


def fense(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """FENSE of each hypothesis (text as it was decoded) against its references.

    Raises:
        UnavailableError: the models are not installed or cannot be read.
    """
    from safetensors import SafetensorError

    folder = find_part("fense")
    try:
        flat = [text for several in references for text in several]
        said, meant = embed(folder / "sbert", hypotheses), embed(folder / "sbert", flat)
        broken = error_probabilities(folder / "detector", hypotheses)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UnavailableError(f"the models in {folder} cannot be used: {str(error).splitlines()[0]}") from error
    scores, first = [], 0
    for row, several in enumerate(references):
        similarity = float((meant[first : first + len(several)] @ said[row]).mean())
        scores.append(similarity * (1 - PENALTY) if broken[row] > THRESHOLD else similarity)
        first += len(several)
    return scores


def embed(folder: Path, sentences: Sequence[str]) -> Any:
    """Sentence embeddings (B,D) of length one: the mean of the last hidden states over each sentence's tokens."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found = []
    with torch.no_grad():
        for start in range(0, len(sentences), BATCH):
            batch = tokenizer(
                list(sentences[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=SENTENCE_TOKENS,
                return_tensors="pt",
            )
            mask = batch["attention_mask"][..., None].float()
            hidden = model(**batch).last_hidden_state  # (B,L,D)
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1e-9)
            found.append(torch.nn.functional.normalize(mean, dim=1))
    return torch.cat(found)


def error_probabilities(folder: Path, sentences: Sequence[str]) -> list[float]:
    """How likely each sentence has an error of any kind, the last of the detector's classes."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    weights = load_file(folder / "model.safetensors")
    head = torch.nn.Linear(weights["clf.weight"].shape[1], weights["clf.weight"].shape[0])
    head.load_state_dict({name: weights.pop(f"clf.{name}") for name in ("weight", "bias")})
    encoder.load_state_dict({name.removeprefix("encoder."): value for name, value in weights.items()})
    encoder.eval()
    plain = [re.sub(r"[^\w\s]", "", text).lower() for text in sentences]  # as the detector was trained
    found: list[float] = []
    with torch.no_grad():
        for start in range(0, len(plain), BATCH):
            batch = tokenizer(
                plain[start : start + BATCH],
                padding="max_length",
                truncation=True,
                max_length=DETECTOR_TOKENS,
                return_tensors="pt",
            )
            logits = head(encoder(**batch).last_hidden_state[:, 0])
            found += logits[:, -1].sigmoid().tolist()
    return found
