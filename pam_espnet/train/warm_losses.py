"""Losses of the warm start: the answers' tokens are to be detected in the audio, in the LLM's embedding space.

For ASR the answer's tokens follow the audio in time, which is what CTC assumes ("ctc"). The words of a caption or a
count do not; they are to be detected anywhere in the audio, in any order ("bag").

Dimension letters: B utterances, U adapter frames, D width.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pam_espnet.frontend.ctc_head import BAG_TEMPERATURE
from pam_espnet.frontend.frontend import AudioEmbeddings
from pam_espnet.model import ESPnetPaMModel, cached_features
from pam_espnet.processes import gathered


def embed_batch(model: ESPnetPaMModel, batch: Mapping[str, Any], only: Sequence[str] | None = None) -> AudioEmbeddings:
    """Audio embeddings of a batch, on the model's device."""
    device = model.decoder.device
    batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return model.audio_embeddings(
        batch["prompt"],
        torch.tensor(batch["num_samples"]),
        batch.get("speech"),
        cached_features(batch),
        only=only,
    )


def _answers(batch: Mapping[str, Any]) -> list[list[int]]:
    return [answer[:-1] for answer in batch["text"]]


def warm_loss(
    model: ESPnetPaMModel,
    batch: Mapping[str, Any],
    losses: Mapping[str, str],
    only: Sequence[str] | None = None,
    bag_temperature: float | None = None,
    priors: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, int, int]:
    """Loss of a batch by its tasks' ``losses``: the sum, the target tokens, the utterances left out.
    ``bag_temperature``, ``priors`` of tasks: see ``EmbeddingCTC.bag_loss``."""
    audio, names = embed_batch(model, batch, only), [model.tasks[index] for index in batch["task"]]
    total, count, skipped = audio.embeddings.sum() * 0.0, 0, 0
    for kind in ("ctc", "bag"):
        if rows := [b for b, name in enumerate(names) if losses[name] == kind]:
            bag = bag_temperature, _prior([names[b] for b in rows], priors)
            one, targets, left_out = _loss(model, kind, audio, _answers(batch), rows, *bag)
            total, count, skipped = total + one, count + targets, skipped + left_out
    return total, count, skipped


def task_priors(model: ESPnetPaMModel, answers: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, Tensor]:
    """Of tasks whose loss is "bag", from their training answers (token ids without the end token): task -> (C-1,)."""
    assert model.ctc is not None
    return {task: model.ctc.log_shares(some) for task, some in answers.items()}


def _prior(tasks: Sequence[str], priors: Mapping[str, Tensor] | None) -> Tensor | None:
    return torch.stack([priors[task] for task in tasks]) if priors and set(tasks) <= set(priors) else None


def _loss(
    model: ESPnetPaMModel,
    kind: str,
    audio: AudioEmbeddings,
    answers: list[list[int]],
    rows: list[int],
    bag_temperature: float | None,
    prior: Tensor | None,
) -> tuple[Tensor, int, int]:
    assert model.ctc is not None
    bag_loss = partial(model.ctc.bag_loss, temperature=bag_temperature, log_prior=prior)
    loss = model.ctc.loss if kind == "ctc" else bag_loss
    return loss(audio.embeddings[rows], audio.lengths[rows], [answers[b] for b in rows], audio.routing.expert[rows])


@torch.no_grad()
def encoder_weights(
    model: ESPnetPaMModel,
    batches: Iterator[tuple[list[str], dict[str, Any]]],
    losses: Mapping[str, str],
    priors: Mapping[str, Tensor] | None = None,
) -> dict[tuple[int, int], Tensor]:
    """What each encoder alone makes of held-out utterances: (expert, index of the task) -> weights (M,), in proportion
    to the likelihood of a target token (model averaging)."""
    names = model.frontend.names
    groups: defaultdict[tuple[int, int], list[float]] = defaultdict(lambda: [0.0] * 2 * len(names))
    for _, batch in batches:
        for m, name in enumerate(names):
            audio = embed_batch(model, batch, only=[name] * len(batch["task"]))
            pairs = list(zip(audio.routing.expert.tolist(), batch["task"], strict=True))
            for pair in sorted(set(pairs)):
                rows = [b for b, one in enumerate(pairs) if one == pair]
                task = model.tasks[pair[1]]
                bag = BAG_TEMPERATURE, _prior([task] * len(rows), priors)
                total, count, _ = _loss(model, losses[task], audio, _answers(batch), rows, *bag)
                groups[pair][2 * m] += float(total)
                groups[pair][2 * m + 1] += count
    every, found = gathered(dict(groups)), {}
    for pair in sorted(set().union(*every)):
        sums, tokens = torch.tensor([part[pair] for part in every if pair in part]).sum(0).view(-1, 2).unbind(1)
        if bool((tokens > 0).all()):
            found[pair] = (sums / tokens).neg().softmax(0)
    return found


def by_expert(weights: Mapping[tuple[int, int], Tensor]) -> dict[int, Tensor]:
    """``encoder_weights`` of each expert: the geometric mean over its tasks."""
    found: defaultdict[int, list[Tensor]] = defaultdict(list)
    for (expert, _), one in weights.items():
        found[expert].append(one.log())
    return {expert: torch.stack(some).mean(0).softmax(0) for expert, some in found.items()}


@torch.no_grad()
def token_errors(
    model: ESPnetPaMModel, batches: Iterator[tuple[list[str], dict[str, Any]]], losses: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    """Held-out errors of all processes: task -> (errors, reference tokens).

    For "ctc" the edit distance of greedy decoding; for "bag" the answer's token types that are not among as many
    types that are detected most (for an answer of one token: the wrong answers).
    """
    from rapidfuzz.distance import Levenshtein

    assert model.ctc is not None
    rows = []
    for _, batch in batches:
        audio = embed_batch(model, batch)
        embeddings, lengths, experts = audio.embeddings, audio.lengths, audio.routing.expert
        answers = _answers(batch)
        for b, index in enumerate(batch["task"]):
            task, one, length, expert = model.tasks[index], *(x[b : b + 1] for x in (embeddings, lengths, experts))
            if losses[task] == "ctc":
                path = model.ctc.greedy(one, length, expert)[0]
                wrong, tokens = Levenshtein.distance(answers[b], path), len(answers[b])
            else:
                types = set(answers[b])
                wrong, tokens = len(types - model.ctc.detect(one, length, [len(types)], expert)[0]), len(types)
            rows.append((task, wrong, tokens))
    found: dict[str, tuple[int, int]] = {}
    for task, wrong, tokens in itertools.chain(*gathered(rows)):
        errors, seen = found.get(task, (0, 0))
        found[task] = errors + wrong, seen + tokens
    return found
