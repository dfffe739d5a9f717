"""FENSE: similarity of sentence embeddings, less where a caption is not fluent.

Zhou et al., "Can Audio Captions Be Evaluated with Image Caption Metrics?" (ICASSP 2022). A caption's score is its mean
cosine similarity to the references (Sentence-BERT, mean over tokens); where the error detector is surer than 0.9 that
the sentence is broken, a tenth of it. Files, in one folder (see ``score/parts.py``):

    sbert/                         paraphrase-TinyBERT-L6-v2, a Hugging Face folder
    detector/                      BERT's configuration and tokenizer, model.safetensors with the detector's weights

Dimension letters: B sentences, L tokens, D width.
"""

import re
from collections.abc import Iterator, Sequence
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
    Raises UnavailableError: the models are not installed or cannot be read."""
    from safetensors import SafetensorError

    folder = find_part("fense")
    try:
        embeddings = embed(folder / "sbert", [*hypotheses, *(text for several in references for text in several)])
        broken = error_probabilities(folder / "detector", hypotheses)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UnavailableError(f"the models in {folder} cannot be used: {str(error).splitlines()[0]}") from error
    scores, first = [], len(hypotheses)
    for row, several in enumerate(references):
        similarity = float((embeddings[first : first + len(several)] @ embeddings[row]).mean())
        scores.append(similarity * (1 - PENALTY) if broken[row] > THRESHOLD else similarity)
        first += len(several)
    return scores


def _hidden(model: Any, folder: Path, texts: Sequence[str], tokens: int, padding: bool | str) -> Iterator[Any]:
    """Last hidden states (B,L,D) and mask (B,L,1) of one batch after another."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for start in range(0, len(texts), BATCH):
        some = list(texts[start : start + BATCH])
        batch = tokenizer(some, padding=padding, truncation=True, max_length=tokens, return_tensors="pt")
        with torch.no_grad():
            yield model(**batch).last_hidden_state, batch["attention_mask"][..., None].float()


def embed(folder: Path, sentences: Sequence[str]) -> Any:
    """Sentence embeddings (B,D) of length one: the mean of the last hidden states over each sentence's tokens."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    batches = _hidden(model, folder, sentences, SENTENCE_TOKENS, padding=True)
    means = [(hidden * mask).sum(1) / mask.sum(1).clamp_min(1e-9) for hidden, mask in batches]
    return torch.nn.functional.normalize(torch.cat(means), dim=1)


def error_probabilities(folder: Path, sentences: Sequence[str]) -> list[float]:
    """The probability that each sentence has an error of any kind, the last of the detector's classes."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel

    encoder = AutoModel.from_config(AutoConfig.from_pretrained(folder)).eval()
    weights = load_file(folder / "model.safetensors")
    weight, bias = weights.pop("clf.weight"), weights.pop("clf.bias")
    encoder.load_state_dict({name.removeprefix("encoder."): value for name, value in weights.items()})
    plain = [re.sub(r"[^\w\s]", "", text).lower() for text in sentences]  # as the detector was trained
    batches = _hidden(encoder, folder, plain, DETECTOR_TOKENS, padding="max_length")
    logits = [torch.nn.functional.linear(hidden[:, 0], weight, bias)[:, -1] for hidden, _ in batches]
    return torch.cat(logits).sigmoid().tolist()
