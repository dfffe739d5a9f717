"""How likely each answer of a set is: its log-probability under the decoder, of all of them, not of the best alone.

A search returns what it found; for a closed question ("how many?", "yes or no?") it is worth knowing how sure the
answer is. Every answer is read token by token behind the same prefix, all of them side by side, so nothing is pruned.

It knows tensors and a decoder. B utterances, A answers, R = B * A rows, P prefix positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pam_espnet.search.beam import SteppingDecoder


@torch.no_grad()
def answer_log_probs(
    decoder: SteppingDecoder,
    prefix: Tensor,
    lengths: Tensor,
    answers: Sequence[Sequence[int]],
    temperature: float = 1.0,
) -> Tensor:
    """Log-probabilities (B,A), each of an answer's tokens and an end token behind them (any of the decoder's).

    They are not normalised over the set: what is left to 1 is what the decoder would rather have said.

    Args:
        decoder: steps with a cache.
        prefix: (B,P,D) embeddings, right-padded.
        lengths: (B,) valid positions.
        answers: token sequences, none of them empty, without an end token.
        temperature: divides the logits, as in the search.
    """
    count, size = len(lengths), len(answers)
    longest = max(map(len, answers))
    ends = list(decoder.eos_ids)
    logits, state = decoder.prefill(prefix, lengths)
    state.select(torch.arange(count, device=logits.device).repeat_interleave(size))
    # What stands behind a short answer is read by no one; it keeps the rows in step.
    padded = torch.tensor([[*answer, *[answer[-1]] * (longest - len(answer))] for answer in answers])
    tokens = padded.repeat(count, 1).to(logits.device)  # (R, longest)
    own = torch.tensor([len(answer) for answer in answers]).repeat(count).to(logits.device)  # (R,)
    logits = logits.repeat_interleave(size, dim=0)
    total = torch.zeros(count * size, device=logits.device)
    for step in range(longest + 1):
        log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)
        total = torch.where(own == step, total + log_probs[:, ends].logsumexp(dim=-1), total)
        if step < longest:
            said = log_probs.gather(1, tokens[:, step : step + 1])[:, 0]
            total = torch.where(own > step, total + said, total)
            logits = decoder.step(tokens[:, step], state)
    return total.view(count, size)
