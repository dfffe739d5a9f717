"""Losses of the warm start: the answers' tokens are to be detected in the audio, in the LLM's embedding space.

For ASR the answer's tokens follow the audio in time, which is what CTC assumes ("ctc"). The words of a caption or a
count do not; they are to be detected anywhere in the audio, in any order ("bag").

Dimension letters: B utterances, U adapter frames, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pam_espnet.model import ESPnetPaMModel, cached_features


def embed_batch(model: ESPnetPaMModel, batch: Mapping[str, Any], only: str | None = None) -> tuple[Tensor, Tensor]:
    """Audio embeddings (B, U, D) of a batch, on the model's device, and their lengths (B,), on the host."""
    device = model.decoder.device
    batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    audio = model.audio_embeddings(
        batch["prompt"],
        torch.tensor(batch["num_samples"]),
        batch.get("speech"),
        cached_features(batch),
        only=only,
    )
    return audio.embeddings, audio.lengths


def _answers(batch: Mapping[str, Any]) -> list[list[int]]:
    return [answer[:-1] for answer in batch["text"]]


def warm_loss(
    model: ESPnetPaMModel, batch: Mapping[str, Any], losses: Mapping[str, str], only: str | None = None
) -> tuple[Tensor, int, int]:
    """Loss of a batch by its tasks' ``losses``: the sum, the target tokens, the utterances left out."""
    assert model.ctc is not None
    embeddings, lengths = embed_batch(model, batch, only)
    answers, names = _answers(batch), [model.tasks[index] for index in batch["task"]]
    total, count, skipped = embeddings.sum() * 0.0, 0, 0
    for kind, loss in (("ctc", model.ctc.loss), ("bag", model.ctc.bag_loss)):
        rows = [b for b, name in enumerate(names) if losses[name] == kind]
        if rows:
            one, targets, left_out = loss(embeddings[rows], lengths[rows], [answers[b] for b in rows])
            total, count, skipped = total + one, count + targets, skipped + left_out
    return total, count, skipped


@torch.no_grad()
def token_errors(
    model: ESPnetPaMModel, batches: Iterator[tuple[list[str], dict[str, Any]]], losses: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    """Held-out errors: task -> (errors, reference tokens).

    For "ctc" the edit distance of greedy decoding; for "bag" the answer's token types that are not among as many
    types that are detected most (for an answer of one token: the wrong answers).
    """
    from rapidfuzz.distance import Levenshtein

    assert model.ctc is not None
    found_errors: dict[str, tuple[int, int]] = {}
    for _, batch in batches:
        embeddings, lengths = embed_batch(model, batch)
        answers = _answers(batch)
        for b, index in enumerate(batch["task"]):
            task, one, length = model.tasks[index], embeddings[b : b + 1], lengths[b : b + 1]
            if losses[task] == "ctc":
                wrong, tokens = Levenshtein.distance(answers[b], model.ctc.greedy(one, length)[0]), len(answers[b])
            else:
                types = set(answers[b])
                wrong, tokens = len(types - model.ctc.detect(one, length, [len(types)])[0]), len(types)
            errors, seen = found_errors.get(task, (0, 0))
            found_errors[task] = errors + wrong, seen + tokens
    return found_errors
