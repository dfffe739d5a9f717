"""CTC in the embedding space of a frozen LLM: the head of the adapters' warm start.

The classes are the LLM's own input embeddings of the token types that occur in the training transcripts, plus a
learned blank; a frame's score for a token is the cosine between the frame and that embedding over a learned
temperature. An adapter fitted this way maps audio to the LLM's word embeddings before the LLM has been run once. The
head does not use the LLM: it is given rows of a matrix.

CTC: Graves et al., ICML 2006. Cosine classes follow ``torch.nn.functional.cosine_similarity``.

Dimension letters: B utterances, U adapter frames, D width, C classes (token types + 1 blank).
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pam_espnet.transfer import upload

BLANK = 0
# Of the bag's scores while encoders are drawn, for every expert and fusion; then they have the expert's own, at which
# the LLM is shown posteriors. Where transcripts share it, they take it to 0.026: from the beginning, that led one seed
# of two to detect fewer words of captions than a constant guess does.
BAG_TEMPERATURE = 0.05


class EmbeddingCTC(nn.Module):
    """Cosine CTC over a subset of an LLM's vocabulary.

    Args:
        token_ids: the LLM's token ids that may be predicted, each once.
        embeddings: their input embeddings, (len(token_ids), D). Frozen; not stored in checkpoints, because the LLM
            that is named in the configuration holds them.
        temperature: initial temperature of the cosine scores.
        num_experts: E; each has a temperature of its own, as words in their order want a sharper one than words
            anywhere.
    """

    token_ids: Tensor
    rows: Tensor  # of unit length
    norms: Tensor  # what their length was

    def __init__(
        self, token_ids: Sequence[int], embeddings: Tensor, temperature: float = 0.07, num_experts: int = 1
    ) -> None:
        super().__init__()
        if len(set(token_ids)) != len(token_ids) or embeddings.shape[0] != len(token_ids):
            raise ValueError(f"{len(token_ids)} token ids need as many distinct rows; got {tuple(embeddings.shape)}")
        # Not in checkpoints: the file that the configuration names holds them, and averaging would sum integers.
        self.register_buffer("token_ids", torch.tensor(list(token_ids), dtype=torch.long), persistent=False)
        self.register_buffer("rows", F.normalize(embeddings.detach().float(), dim=-1), persistent=False)
        self.register_buffer("norms", embeddings.detach().float().norm(dim=-1), persistent=False)
        self.blank = nn.Parameter(torch.randn(embeddings.shape[1]) / math.sqrt(embeddings.shape[1]))
        self.log_temperature = nn.Parameter(torch.full((num_experts,), math.log(temperature)))
        self._class_of = {token: i + 1 for i, token in enumerate(token_ids)}

    def temperature(self, expert: Tensor | None = None) -> Tensor:
        """(B,1,1) of the utterances' experts (B,) long; (1,1,1) without, where there is one expert."""
        if expert is None:
            if len(self.log_temperature) > 1:
                raise ValueError(f"{len(self.log_temperature)} experts: whose temperature?")
            return self.log_temperature.exp()[:, None, None]
        return self.log_temperature.exp()[expert][:, None, None]

    def log_probs(self, frames: Tensor, expert: Tensor | None = None, alone: Tensor | None = None) -> Tensor:
        """Log-probabilities (B,U,C) of audio embeddings (B,U,D); class 0 is the blank. ``expert``: of each utterance
        (B,), see ``temperature``. ``alone``: lengths (B,), where each utterance is computed by itself, zeros behind it:
        on a GPU the rounding of a product depends on all rows."""
        if alone is not None:
            rows = [
                self.log_probs(frames[b : b + 1, :u], _of(expert, slice(b, b + 1)))[0]
                for b, u in enumerate(alone.tolist())
            ]
            return pad_sequence(rows, batch_first=True)
        frames, blank = F.normalize(frames.float(), dim=-1), F.normalize(self.blank, dim=0)
        # Two products: in one with all classes, the fixed rows would get a gradient, too.
        cosine = torch.cat([frames @ blank[:, None], frames @ self.rows.T], dim=-1)
        return torch.log_softmax(cosine / self.temperature(expert), dim=-1)

    def expected_embeddings(self, frames: Tensor, expert: Tensor | None = None, alone: Tensor | None = None) -> Tensor:
        """(B,U,D) mean of the token embeddings under the posteriors of each frame (B,U,D); the blank counts as zero.
        ``expert`` and ``alone`` as in ``log_probs``.

        An adapter's frame is nearer to the embedding of the right token than to others, and yet mostly something else:
        a cosine of one half leaves three quarters of its energy to what the LLM cannot know. Posteriors leave that out.
        """
        return (self.log_probs(frames, expert, alone)[..., 1:].exp() * self.norms) @ self.rows

    def classes(self, tokens: Sequence[int]) -> list[int] | None:
        """Class indices of an answer's tokens, or None when one of them is outside the head's vocabulary."""
        found = [self._class_of.get(int(token), BLANK) for token in tokens]
        return None if BLANK in found else found

    def loss(
        self, frames: Tensor, lengths: Tensor, answers: Sequence[Sequence[int]], expert: Tensor | None = None
    ) -> tuple[Tensor, int, int]:
        """Summed CTC loss of the answers that can be aligned.

        Args:
            frames: audio embeddings (B,U,D).
            lengths: valid frames (B,), on the host.
            answers: token ids of each utterance, without the end token; one without any is left out.
            expert: of each utterance (B,), see ``temperature``.

        Returns:
            the summed negative log-likelihood, the number of target tokens it sums over, and the number of
            utterances left out (a token outside the head's vocabulary, or fewer frames than CTC needs).
        """
        targets = {}
        for b, answer in enumerate(answers):
            found = self.classes(answer)
            # CTC needs a frame for each token, and one for a blank between equal neighbours.
            if found and len(found) + sum(x == y for x, y in pairwise(found)) <= int(lengths[b]):
                targets[b] = found
        if not targets:
            return frames.sum() * 0.0, 0, len(answers)
        rows = list(targets)
        index, flat = upload(frames.device, rows, [c for target in targets.values() for c in target])
        target_lengths = torch.tensor([len(target) for target in targets.values()])
        log_probs = self.log_probs(frames[index], _of(expert, index)).transpose(0, 1)
        total = F.ctc_loss(log_probs, flat, lengths[rows], target_lengths, blank=BLANK, reduction="sum")
        return total, flat.numel(), len(answers) - len(rows)

    def pooled_scores(
        self, frames: Tensor, lengths: Tensor, expert: Tensor | None = None, temperature: float | None = None
    ) -> Tensor:
        """Scores (B,C-1) of each token type anywhere in an utterance, in the order of ``token_ids``.

        Cosines as CTC's over ``temperature``, by default that of each utterance's ``expert`` (B,), log-mean-exp over
        the valid frames: near the maximum for a short sound, near the mean for a long one (pooling for weak labels;
        Wang, Li and Metze, ICASSP 2019, compare).
        """
        cosine = F.normalize(frames.float(), dim=-1) @ self.rows.T / (temperature or self.temperature(expert))
        valid = torch.arange(frames.shape[1], device=frames.device) < lengths[:, None].to(frames.device)
        pooled = cosine.masked_fill(~valid[..., None], -torch.inf).logsumexp(dim=1)
        return pooled - lengths.to(pooled)[:, None].clamp_min(1).log()

    def bag_loss(
        self,
        frames: Tensor,
        lengths: Tensor,
        answers: Sequence[Sequence[int]],
        expert: Tensor | None = None,
        temperature: float | None = None,
        log_prior: Tensor | None = None,
    ) -> tuple[Tensor, int, int]:
        """Summed cross-entropy of the answers' token types, in any order and at any time.

        For answers that do not follow the audio in time, where CTC learns little more than its blank: each word of a
        caption must score high somewhere. Arguments and results are those of ``loss``; ``temperature`` as in
        ``pooled_scores``; ``log_prior`` (B,C-1), see ``log_shares``, is added to the scores here and nowhere else, so
        that they need not say what is true of any answer (logit adjustment: Menon et al., ICLR 2021).
        """
        found = [self.classes(sorted(set(answer))) for answer in answers]
        rows = [b for b, classes in enumerate(found) if classes]
        if not rows:
            return frames.sum() * 0.0, 0, len(answers)
        scores = self.pooled_scores(frames[rows], lengths[rows], _of(expert, rows), temperature)
        log_probs = F.log_softmax(scores if log_prior is None else scores + log_prior[rows], dim=-1)
        pairs = torch.tensor([(row, c - 1) for row, b in enumerate(rows) for c in found[b] or []], device=frames.device)
        return -log_probs[pairs[:, 0], pairs[:, 1]].sum(), len(pairs), len(answers) - len(rows)

    def log_shares(self, answers: Sequence[Sequence[int]]) -> Tensor:
        """(C-1,) logarithm of the share of ``answers`` that have each token type; one that none has counts as rare."""
        shares = torch.zeros(len(self.rows))
        for answer in answers:
            shares[[c - 1 for c in self.classes(sorted(set(answer))) or ()]] += 1
        return (shares.clamp_min(1) / max(len(answers), 1)).log()

    @torch.no_grad()
    def detect(
        self, frames: Tensor, lengths: Tensor, counts: Sequence[int], expert: Tensor | None = None
    ) -> list[set[int]]:
        """The ``counts[b]`` token ids of the highest pooled scores in each utterance; all, where there are fewer."""
        scores = self.pooled_scores(frames, lengths, expert)
        best = [row.topk(min(count, len(row))).indices for row, count in zip(scores, counts, strict=True)]
        return [set(self.token_ids[indices].tolist()) for indices in best]

    @torch.no_grad()
    def greedy(
        self, frames: Tensor, lengths: Tensor, expert: Tensor | None = None, alone: bool = False
    ) -> list[list[int]]:
        """Best-path decoding: token ids of each utterance (B lists); ``expert``, ``alone``: see ``log_probs``."""
        best = self.log_probs(frames, expert, lengths if alone else None).argmax(dim=-1)
        answers = []
        for row, length in zip(best, lengths.tolist(), strict=True):
            collapsed = torch.unique_consecutive(row[:length])
            answers.append(self.token_ids[collapsed[collapsed != BLANK] - 1].tolist())
        return answers


def _of(expert: Tensor | None, rows: Any) -> Tensor | None:
    """The experts of some utterances; None where there is one for all."""
    return None if expert is None else expert[rows]
