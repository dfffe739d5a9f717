"""Losses of the warm start: the answers' tokens are to be detected in the audio, in the LLM's embedding space.

For ASR the answer's tokens follow the audio in time, which is what CTC assumes ("ctc"). The words of a caption or a
count do not; they are to be detected anywhere in the audio, in any order ("bag").

Dimension letters: B utterances, U adapter frames, D width.
"""

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
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
            one, targets, left_out = _loss(model, kind, audio, batch, rows, bag_temperature, priors)
            total, count, skipped = total + one, count + targets, skipped + left_out
    return total, count, skipped


def _loss(
    model: ESPnetPaMModel,
    kind: str,
    audio: AudioEmbeddings,
    batch: Mapping[str, Any],
    rows: list[int],
    bag_temperature: float | None,
    priors: Mapping[str, Tensor] | None,
) -> tuple[Tensor, int, int]:
    assert model.ctc is not None
    answers = _answers(batch)
    chosen = audio.embeddings[rows], audio.lengths[rows], [answers[b] for b in rows], audio.routing.expert[rows]
    if kind == "ctc":
        return model.ctc.loss(*chosen)
    prior = None if priors is None else torch.stack([priors[model.tasks[batch["task"][b]]] for b in rows])
    return model.ctc.bag_loss(*chosen, bag_temperature, prior)


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
                kind = losses[model.tasks[pair[1]]]
                total, count, _ = _loss(model, kind, audio, batch, rows, BAG_TEMPERATURE, priors)
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
    model: ESPnetPaMModel,
    batches: Iterator[tuple[list[str], dict[str, Any]]],
    losses: Mapping[str, str],
    priors: Mapping[str, Tensor] | None = None,
) -> dict[str, tuple[float, float]]:
    """Held-out errors of all processes: task -> (errors, reference tokens).

    For "ctc" the edit distance of greedy decoding; for "bag" the answer's token types that are not among as many
    types that are detected most (for an answer of one token: the wrong answers). With ``priors``, see
    ``EmbeddingCTC.log_shares``, such a type is weighted by its information, the logarithm of one over its share: what
    is in most answers, as the words of a template, counts next to nothing.
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
                wrong, tokens = float(Levenshtein.distance(answers[b], path)), float(len(answers[b]))
            else:
                types = set(answers[b])
                missed = types - model.ctc.detect(one, length, [len(types)], expert)[0]
                shares = None if priors is None else priors[task]
                wrong, tokens = (_information(model, some, shares) for some in (missed, types))
            rows.append((task, wrong, tokens))
    found: dict[str, tuple[float, float]] = {}
    for task, wrong, tokens in itertools.chain(*gathered(rows)):
        errors, seen = found.get(task, (0.0, 0.0))
        found[task] = errors + wrong, seen + tokens
    return found


def _information(model: ESPnetPaMModel, types: Collection[int], log_shares: Tensor | None) -> float:
    """The number of token types, or with shares their information in nats; outside the head's vocabulary as the
    rarest."""
    if log_shares is None:
        return float(len(types))
    assert model.ctc is not None
    classes = [model.ctc.classes([token]) for token in types]
    return sum(-float(log_shares.min() if one is None else log_shares[one[0] - 1]) for one in classes)
