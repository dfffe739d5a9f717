"""The LLM in ESPnet's own beam search, beside CTC or any other of its scorers.

This project's search is faster; ESPnet's adds up scores of several models. An example, with the CTC head that the warm
start leaves (``task_vocabulary`` gives the LLM the tokens that the head knows, others could not be said by both):

    import torch
    from espnet2.legacy.nets.batch_beam_search import BatchBeamSearch
    from espnet2.legacy.nets.scorers.ctc import CTCPrefixScorer

    from pam_espnet.decode.options import AnswerOptions
    from pam_espnet.data.audio import read_audio
    from pam_espnet.espnet_scorer import LLMScorer, SharedCTC
    from pam_espnet.decode.speech_llm import SpeechLLM

    model = SpeechLLM.load("exp/mine", AnswerOptions.from_dict({"task_vocabulary": True}))
    prompt = "Transcribe the speech."
    wave, _ = read_audio("speech.flac")  # mono, at the model's sample rate
    with torch.no_grad():
        audio = model.model.audio_embeddings([prompt], torch.tensor([len(wave)]), torch.from_numpy(wave)[None])
    llm = LLMScorer(model.decoder, prompt)
    ctc = CTCPrefixScorer(SharedCTC(model.model.ctc, llm), llm.eos)
    search = BatchBeamSearch(
        {"llm": llm, "ctc": ctc}, {"llm": 0.7, "ctc": 0.3}, beam_size=4, vocab_size=llm.vocab_size,
        sos=llm.eos, eos=llm.eos, pre_beam_score_key="full",
    )
    best = search(audio.embeddings[0], maxlenratio=-64)[0]  # at most 64 tokens
    print(model.text(llm.tokens(best.yseq)))

ESPnet's ids are E: 0 is CTC's blank, 1 to E-2 are tokens that can be said, E-1 begins and ends an answer.

What ESPnet's search does otherwise than ``search.beam``: of a beam's K best continuations those that end leave it, so
that fewer than K go on, where transformers (and this project) look at 2K and keep K; it goes on to ``maxlenratio``
or until ``end_detect`` (with 0) sees scores fall; scores are sums, or means with ``normalize_length``; and at the
length cap an end is appended that nobody scored.

B utterances, N rows (running hypotheses), U audio frames, D width, W tokens that the LLM can say, E ids of ESPnet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from espnet2.legacy.nets.scorer_interface import BatchScorerInterface
from torch import Tensor

from pam_espnet.engine.view import DecoderView
from pam_espnet.errors import ConfigError
from pam_espnet.frontend.ctc_head import EmbeddingCTC
from pam_espnet.llm.prompt_layout import layout, place

BLANK = 0
LOG_ZERO = -1e10  # what ESPnet's scorers give to the impossible


class LLMScorer(BatchScorerInterface):
    """An LLM that reads ``[prompt head | audio | prompt tail]`` once and then scores tokens.

    A hypothesis' state is the number of its node in the LLM's memory of the utterance: whatever ESPnet re-orders,
    repeats or drops, no keys or values are copied. One search at a time; scores of the last step's hypotheses only.

    Args:
        view: the LLM with the tokens that can be said.
        prompt: of all utterances.

    Attributes:
        vocab_size: E.
        eos: E-1, the id that begins and ends answers.
        token_ids: (E-2) the LLM's ids of ESPnet's 1, 2, ...
    """

    def __init__(self, view: DecoderView, prompt: str) -> None:
        if view.deferred:
            raise ConfigError("exit.fill: deferred corrects scores afterwards, ESPnet's search cannot; choose another")
        self.view = view
        ends = set(view.eos_ids)
        count = view.decoder.vocab_size if view.ids is None else len(view.ids)
        kept = [place for place in range(count) if place not in ends]
        self.token_ids = view.tokens(kept)
        self.vocab_size = len(kept) + 2
        self.eos = self.vocab_size - 1
        device = view.decoder.device
        self._kept = torch.tensor(kept, device=device)
        self._ends = torch.tensor(view.eos_ids, device=device)
        # (E,) what the LLM reads for ESPnet's ids. ESPnet keeps rows of ended hypotheses in a batch of utterances
        # and does not use their scores: an end token will do for them.
        self._places = torch.tensor([view.eos_ids[0], *kept, view.eos_ids[0]], device=device)
        parts = layout(view.decoder.tokenizer, prompt, view.decoder.system)
        self._head = torch.tensor(parts.head_ids, device=device)
        self._tail = torch.tensor(parts.tail_ids, device=device)
        self._memory: Any = None
        self._first: Tensor | None = None  # (B,W) of the prefixes, until they are asked for
        self._rows: dict[int, int] = {}  # node -> its row in the memory
        self._nodes = 0  # so far

    def tokens(self, yseq: Tensor | Sequence[int]) -> list[int]:
        """An ESPnet hypothesis -> the LLM's token ids, without begin and end."""
        return [self.token_ids[int(y) - 1] for y in yseq if int(y) not in (BLANK, self.eos)]

    def init_state(self, x: Tensor) -> int:
        """Run the prefix of one utterance, audio embeddings (U,D) -> its node."""
        return self.batch_init_state(x)

    def batch_init_state(self, x: Tensor, xs_lengths: Tensor | None = None) -> int:
        """Run the prefixes.

        Args:
            x: audio embeddings (U,D), or (B,U,D), right-padded.
            xs_lengths: (B,) frames.

        Returns:
            the node that stands for every utterance's prefix.
        """
        audio = x if x.dim() == 3 else x[None]
        count = len(audio)
        lengths = torch.full((count,), audio.shape[1]) if xs_lengths is None else xs_lengths
        embed = self.view.decoder.embed
        with torch.no_grad():
            placed = place(
                [self._head] * count, audio, lengths.to(audio.device), [self._tail] * count, None, embed
            )
            self._first, self._memory = self.view.prefill(placed.embeds, placed.prefix_lengths)
        self._rows = {self._nodes: 0}
        self._nodes += 1
        return self._nodes - 1

    def batch_score(self, ys: Tensor, states: Sequence[int], xs: Tensor) -> tuple[Tensor, list[int]]:
        """Log-probabilities of the next token.

        Args:
            ys: (N,L) ESPnet's ids; the rows of an utterance are neighbours, as many for each one.
            states: the nodes of ``ys`` without their last id.
            xs: not needed, the LLM has heard the audio.

        Returns:
            (N,E); the nodes of ``ys``.

        Raises:
            ConfigError: a node of an earlier step or search.
        """
        if any(node not in self._rows for node in states):
            raise ConfigError(
                "a hypothesis that is not of the last step: LLMScorer serves one breadth-first search at a time; "
                "use espnet2.legacy.nets.batch_beam_search.BatchBeamSearch, and a scorer of its own for each search"
            )
        if self._first is not None:
            if ys.shape[1] != 1:
                raise ConfigError("hyp_primer: the prompt is part of the prefix; leave it None")
            share = len(states) // len(self._first)
            rows = [row // share for row in range(len(states))]
            logits, self._first = self._first[rows], None
        else:
            self._memory.select(torch.tensor([self._rows[node] for node in states], device=self._places.device))
            rows = list(range(len(states)))
            logits = self.view.step(self._places[ys[:, -1].to(self._places.device)], self._memory)
        nodes = list(range(self._nodes, self._nodes + len(rows)))
        self._nodes += len(rows)
        self._rows = dict(zip(nodes, rows, strict=True))
        return self._scores(logits).to(xs.device), nodes

    def score(self, y: Tensor, state: Any, x: Tensor) -> tuple[Tensor, Any]:
        """Not offered: one hypothesis at a time would forget the others.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "LLMScorer scores all hypotheses of a step together; use BatchBeamSearch "
            "(espnet2.legacy.nets.batch_beam_search) instead of BeamSearch"
        )

    def _scores(self, logits: Tensor) -> Tensor:
        """Logits (N,W) -> (N,E). ESPnet has one end: that any of the LLM's end tokens comes."""
        log_probs = logits.log_softmax(-1)
        scores = log_probs.new_full((len(logits), self.vocab_size), LOG_ZERO)
        scores[:, 1:-1] = log_probs[:, self._kept]
        scores[:, -1] = log_probs[:, self._ends].logsumexp(-1)
        return scores


class SharedCTC:
    """The warm start's CTC head in the ids of an ``LLMScorer``, as ESPnet's ``CTCPrefixScorer`` asks for it.

    What the head does not know gets no probability. What the LLM cannot say takes its own away: nothing is
    renormalised.

    Args:
        head: over audio embeddings.
        scorer: with the ids.
    """

    def __init__(self, head: EmbeddingCTC, scorer: LLMScorer) -> None:
        self.head = head
        self.vocab_size = scorer.vocab_size
        shared = [(i, known[0]) for i, token in enumerate(scorer.token_ids, 1) if (known := head.classes([token]))]
        self.ids = [BLANK, *(i for i, _ in shared)]
        self.classes = [BLANK, *(c for _, c in shared)]

    @torch.no_grad()
    def log_softmax(self, frames: Tensor) -> Tensor:
        """Audio embeddings (B,U,D) -> log-probabilities (B,U,E)."""
        own = self.head.log_probs(frames)
        found = own.new_full((*own.shape[:-1], self.vocab_size), LOG_ZERO)
        found[..., self.ids] = own[..., self.classes]
        return found
