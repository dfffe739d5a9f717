"""What each encoder alone makes of held-out utterances, the weights that experts get from it, and held-out errors."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import TEXTS, tiny_config

from pam_espnet.data.tasks import TASKS
from pam_espnet.frontend.ctc_head import BAG_TEMPERATURE
from pam_espnet.model import ESPnetPaMModel, build_model
from pam_espnet.train.warm_losses import by_expert, embed_batch, encoder_weights, token_errors, warm_loss

LOSSES = {"asr": "ctc", "count": "bag", "caption": "bag"}


@pytest.fixture
def model(tiny_llm_dir: Path, tmp_path: Path) -> ESPnetPaMModel:
    torch.manual_seed(0)
    tokens = tmp_path / "tokens"
    tokens.write_text("\n".join(map(str, range(100, 290))))
    return build_model(tiny_config(tiny_llm_dir, ctc_tokens=str(tokens))).eval()


def batch(model: ESPnetPaMModel, tasks: list[str], seed: int) -> tuple[list[str], dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [f"{task}{seed}" for task in tasks], {
        "speech": torch.randn(len(tasks), 16000, generator=generator) * 0.1,
        "num_samples": [16000] * len(tasks),
        "prompt": [TASKS[task].default_prompt for task in tasks],
        "text": [[100 + len(TEXTS[task]), 101, model.decoder.end_id] for task in tasks],
        "task": [model.tasks.index(task) for task in tasks],
    }


def test_weights_are_the_likelihoods_of_a_token(model: ESPnetPaMModel) -> None:
    batches = [batch(model, ["asr", "count", "asr"], 1), batch(model, ["count", "asr"], 2)]
    found = encoder_weights(model, iter(batches), LOSSES)
    for task in ("asr", "count"):
        means = []
        for name in model.frontend.names:
            total, count = 0.0, 0
            for _, one in batches:
                rows = [b for b, index in enumerate(one["task"]) if model.tasks[index] == task]
                part = {key: [value[b] for b in rows] for key, value in one.items() if key != "speech"}
                part |= {"speech": one["speech"][rows]}
                loss, tokens, _ = warm_loss(model, part, LOSSES, [name] * len(rows), BAG_TEMPERATURE)
                total, count = total + loss.item(), count + tokens
            means.append(-total / count)
        pairs = [pair for pair in found if pair[1] == model.tasks.index(task)]
        assert len(pairs) == 1 and means[0] != means[1]
        torch.testing.assert_close(found[pairs[0]], torch.tensor(means).softmax(0), rtol=1e-4, atol=1e-6)


def test_an_expert_of_two_tasks_gets_the_geometric_mean() -> None:
    one, other = torch.tensor([0.8, 0.2]), torch.tensor([0.5, 0.5])
    found = by_expert({(0, 0): one, (0, 1): other, (2, 2): other})
    expected = (one * other).sqrt()
    torch.testing.assert_close(found[0], expected / expected.sum())
    torch.testing.assert_close(found[2], other)


def test_held_out_errors_weigh_words_by_their_information(model: ESPnetPaMModel) -> None:
    """The second token is in every answer, the first of some in half of them: one bit."""
    assert model.ctc is not None
    _, utterances = batch(model, ["count"] * 4, 1)
    utterances["text"] = [[token, 101, model.decoder.end_id] for token in (102, 103, 102, 103)]
    priors = {"count": model.ctc.log_shares([answer[:-1] for answer in utterances["text"]])}
    audio = embed_batch(model, utterances)
    detected = model.ctc.detect(audio.embeddings, audio.lengths, [2] * 4, audio.routing.expert)
    wrong = sum(answer[0] not in types for answer, types in zip(utterances["text"], detected, strict=True))
    missed = sum(len(set(answer[:-1]) - types) for answer, types in zip(utterances["text"], detected, strict=True))
    assert token_errors(model, iter([([], utterances)]), LOSSES) == {"count": (missed, 8)}
    errors, nats = token_errors(model, iter([([], utterances)]), LOSSES, priors)["count"]
    assert nats == pytest.approx(4 * math.log(2)) and errors == pytest.approx(wrong * math.log(2))
    assert missed > 0


def test_a_word_outside_the_vocabulary_counts_as_the_rarest(model: ESPnetPaMModel) -> None:
    assert model.ctc is not None
    _, utterances = batch(model, ["count"] * 2, 1)
    utterances["text"] = [[102, model.decoder.end_id], [999, model.decoder.end_id]]  # the head has 100 to 289
    priors = {"count": model.ctc.log_shares([[102], [102]])}
    errors, nats = token_errors(model, iter([([], utterances)]), LOSSES, priors)["count"]
    assert nats == pytest.approx(math.log(2)) and errors == pytest.approx(math.log(2))
