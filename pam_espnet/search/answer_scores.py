"""Log-probabilities of all answers of a set, for a closed question ("how many?", "yes or no?").

Every answer is read token by token behind the same prefix, all of them side by side, so nothing is pruned.

B utterances, A answers, R = B * A rows, P prefix positions, D width, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pam_espnet.engine.engine import Engine
from pam_espnet.transfer import upload


@torch.no_grad()
def answer_log_probs(
    engine: Engine,
    prefix: Tensor,
    lengths: Tensor,
    answers: Sequence[Sequence[int]],
    temperature: float = 1.0,
) -> Tensor:
    """Log-probabilities (B,A), each of an answer's tokens and an end token behind them (any of the engine's).

    They are not normalised over the set: what is left to 1 belongs to other answers.

    Args:
        prefix: (B,P,D) embeddings, right-padded.
        lengths: (B,) valid positions.
        answers: token sequences, none of them empty, without an end token.
        temperature: divides the logits, as in the search.
    """
    count, size = len(lengths), len(answers)
    longest = max(map(len, answers))
    logits, state = engine.prefill(prefix, lengths)
    state.select([b for b in range(count) for _ in answers])
    # What follows a short answer is never read; it keeps the rows in step.
    padded = [token for answer in answers for token in [*answer, *[answer[-1]] * (longest - len(answer))]]
    ends, tokens, own = upload(logits.device, engine.eos_ids, padded, [len(answer) for answer in answers])
    tokens, own = tokens.view(size, longest).repeat(count, 1), own.repeat(count)  # (R, longest), (R,)
    logits = logits.repeat_interleave(size, dim=0)
    total = torch.zeros(count * size, device=logits.device)
    for step in range(longest + 1):
        log_probs = engine.log_probs(logits, temperature)
        total = torch.where(own == step, total + log_probs[:, ends].logsumexp(dim=-1), total)
        if step < longest:
            chosen = log_probs.gather(1, tokens[:, step : step + 1])[:, 0]
            total = torch.where(own > step, total + chosen, total)
            logits = engine.step(tokens[:, step], state)
    return total.view(count, size)
