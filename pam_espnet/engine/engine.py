"""The engine: an LLM as decoding runs it, the prefix once, then token by token.

    engine = make_engine(llm)                   # LoRA merged, weights packed: a copy
    engine.take_over()                          # where no new prompt will come: the LLM's own weights are freed
    logits, state = engine.prefill(prefix, lengths)
    state.select(rows)                          # beams fork, end, are re-ordered
    logits = engine.step(tokens, state)

Llama-type LLMs run in ``engine.llama``, on CUDA in ``engine.static``, which captures its passes as graphs; any other
causal LLM runs through transformers and its cache, below. Another implementation is another subclass. All give the
same logits up to rounding.

The output layer can be cut to a vocabulary, for tasks whose answers use few token types: probabilities are normalised
over what is left, as transformers' ``suppress_tokens`` with ``renormalize_logits`` does, and the search works with
vocabulary indices; ``token_ids`` translates back.

B utterances, P prefix positions, R rows (hypotheses), N rows with drafts, W tokens that can be predicted, D width.
"""

from __future__ import annotations

import copy
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pam_espnet.engine.exits import ExitOptions
from pam_espnet.errors import ConfigError
from pam_espnet.llm.llm import LLM
from pam_espnet.llm.lora import lora_precision
from pam_espnet.transfer import upload

if TYPE_CHECKING:
    from pam_espnet.engine.llama import LlamaEngine

# Same block: RMS norm, attention with rotary positions, RMS norm, gated feed-forward network.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TOLERANCE = {torch.float32: 1e-3}  # of the self-check: length of the difference over the length of the logits
COARSE_TOLERANCE = 0.05  # in half precision
INT8_TOLERANCE = 0.2  # of rounded weights; the floats that they were rounded from have been held to the above


class State(Protocol):
    """What an engine remembers of R rows; the rows of an utterance are neighbours."""

    depths: Sequence[int]  # (R,) the block that each row's last logits came from

    def select(self, rows: Sequence[int]) -> None:
        """Keep ``rows`` (R',), repeats and drops allowed: re-orders beams, forks a prefix, drops what is finished."""


class Engine(ABC):
    """An LLM as decoding runs it; ``make_engine`` makes one.

    Attributes:
        ids: (W,) sorted token ids that can be predicted, vocabulary index w is ``ids[w]``; None for all.
        eos_ids: vocabulary indices of the end tokens.
        precision: of the products, "float32", "bfloat16" or "int8".
        can_verify: whether ``prefill`` takes drafts and ``verify`` works.
        can_exit: whether ``with_exits`` takes other exits than "never".
        graphs: whether passes run on fixed buffers, as CUDA graphs where there is CUDA.
    """

    can_verify = False
    can_exit = False
    graphs = False

    def __init__(self, llm: LLM, vocabulary: Collection[int] | None) -> None:
        self.llm = llm
        self.ids: Tensor | None = None
        self.eos_ids: tuple[int, ...] = llm.eos_ids
        self.precision = str(llm.dtype).removeprefix("torch.")
        if vocabulary is not None:
            wanted = sorted({*vocabulary, *llm.eos_ids})
            if wanted[0] < 0 or wanted[-1] >= llm.vocab_size:
                raise ConfigError(f"task vocabulary: ids must be 0 to {llm.vocab_size - 1}")
            self.ids = torch.tensor(wanted, device=llm.device)
            self.index = {token: index for index, token in enumerate(wanted)}
            self.eos_ids = tuple(self.index[end] for end in llm.eos_ids)

    def indices(self, token_ids: Sequence[int]) -> list[int]:
        """Token ids -> vocabulary indices.
        Raises ConfigError: a token outside the vocabulary."""
        if self.ids is None:
            return list(token_ids)
        if missing := sorted(set(token_ids) - set(self.index)):
            raise ConfigError(f"task vocabulary: the tokens {missing} are not in it")
        return [self.index[token] for token in token_ids]

    def token_ids(self, indices: Sequence[int]) -> list[int]:
        """Vocabulary indices -> token ids."""
        return list(indices) if self.ids is None else self.ids[list(indices)].tolist()

    @abstractmethod
    def prefill(
        self, prefix: Tensor, lengths: Tensor, drafts: Sequence[Sequence[int]] | None = None
    ) -> tuple[Tensor, Any]:
        """Run the prefix of every utterance once, at full depth.

        Args:
            prefix: (B,P,D) embeddings, right-padded.
            lengths: (B,) valid positions, at least 1.
            drafts: B sequences of vocabulary indices, read behind the prefixes in the same pass.

        Returns:
            float32 logits (N,W) behind each prefix and behind every token of its draft, and the ``State`` of N rows.
        """

    @abstractmethod
    def step(self, tokens: Tensor, state: Any) -> Tensor:
        """Append vocabulary indices (R,) to the R rows of ``state`` -> float32 logits (R,W) of the next token."""

    @abstractmethod
    def verify(self, tokens: Tensor, lengths: Sequence[int], state: Any) -> Tensor:
        """Append ``lengths`` (R,) drafted tokens, at least 1, to each row; each of them becomes a row, at full depth.

        Args:
            tokens: (N,) vocabulary indices, those of the first row, then those of the second, ...
            lengths: (R,), they sum to N.
            state: of R rows; of N rows afterwards.

        Returns:
            float32 logits (N,W) behind each token.
        """

    @abstractmethod
    def with_exits(self, options: ExitOptions) -> Engine:
        """An engine of the same weights whose steps may exit before the last block.

        Raises:
            ConfigError: a block that the LLM does not have; an LLM that only transformers can run.
            CheckpointError: a calibration that cannot be read or belongs to another LLM.
            PamError: the LLM's weights were freed before its first engine with exits was made.
        """

    @abstractmethod
    def take_over(self) -> None:
        """Free the LLM's own weights for good; prompts whose vectors were not computed before are then errors."""

    def log_probs(self, logits: Tensor, temperature: float) -> Tensor:
        """Log-probabilities (R,W) of the next token from logits (R,W)."""
        return torch.log_softmax(logits.float() / temperature, dim=-1)

    def release(self) -> None:  # noqa: B027 - most engines keep nothing
        """Free what is kept from batch to batch; it is made again when it is needed."""


def make_engine(
    llm: LLM,
    vocabulary: Collection[int] | None = None,
    exits: ExitOptions | None = None,
    int8: bool = False,
    graphs: str = "auto",
    batch_invariant: bool = True,
) -> Engine:
    """The engine of a trained LLM.

    A self-check compares it with transformers, so that a family member with a twist that is not known here is left to
    transformers. int8 weights are checked as floats first, and again after rounding.

    Args:
        llm: with or without LoRA; later changes of its weights are not followed.
        vocabulary: token ids that can be predicted, beside the LLM's end tokens; None for all.
        exits: when to exit before the last block.
        int8: round the weights to 8 bits.
        graphs: passes on fixed buffers, captured as CUDA graphs: "auto" (on CUDA, for a Llama-type LLM), "on" (also on
            a CPU, where nothing is captured), "off".
        batch_invariant: with graphs, products whose rows do not depend on how many there are.

    Raises ConfigError: an id outside the LLM's vocabulary; int8 for an LLM that rounding breaks or that only
    transformers can run, or on a machine that cannot do it; graphs "on" for such an LLM, or with int8; and what
    ``Engine.with_exits`` raises.
    """
    from pam_espnet.engine.llama import LlamaEngine

    if graphs == "on" and int8:
        raise ConfigError("graphs: on: int8 has none; set graphs to auto, or dtype to float32")
    engine: Engine = TransformersEngine(llm, vocabulary)
    if llm.fused_decoding and _is_llama(llm.lm):
        fused = LlamaEngine(llm, vocabulary, int8=False)
        difference = self_check(fused)
        if difference <= tolerance(llm):
            engine = fused
        else:
            logging.warning(
                f"{type(llm.lm).__name__}: the engine's blocks differ from transformers' by {difference:.2g}; decoding "
                "goes through transformers, which is slower"
            )
    if graphs == "on" and not isinstance(engine, LlamaEngine):
        raise ConfigError(f"graphs: on: transformers must run {type(llm.lm).__name__}; set graphs to auto")
    if isinstance(engine, LlamaEngine) and (graphs == "on" or (graphs == "auto" and llm.device.type == "cuda")):
        engine = _with_graphs(engine, graphs == "on", batch_invariant)
    if int8:
        if not isinstance(engine, LlamaEngine):
            reason = "its blocks are not Llama's" if llm.fused_decoding else "llm_conf.fused_decoding is false"
            raise ConfigError(f"dtype int8: transformers must run {type(llm.lm).__name__}, {reason}; use float32")
        engine = LlamaEngine(llm, vocabulary, int8=True)
        if not (difference := self_check(engine)) <= INT8_TOLERANCE:
            raise ConfigError(f"dtype int8: rounded weights change this LLM's logits by {difference:.2g}; use float32")
    return engine if exits is None or exits.mode == "never" else engine.with_exits(exits)


def _with_graphs(engine: LlamaEngine, wanted: bool, batch_invariant: bool) -> Engine:
    """The same on fixed buffers; ``engine`` where that gives other logits, or is not possible here.
    Raises ConfigError: then, if it was ``wanted``."""
    from pam_espnet.engine.graphs import out_of_memory
    from pam_espnet.engine.static import StaticEngine

    began = time.perf_counter()
    try:
        static = StaticEngine(engine, batch_invariant)
        difference = self_check(static, engine)
        static.release()
        if difference <= tolerance(engine.llm):
            logging.info(f"graphs: checked in {time.perf_counter() - began:.1f} s")
            return static
        reason = f"logits differ by {difference:.2g}"
    except Exception as error:  # of Triton's compiler, of a driver: all of them leave the eager way
        if out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}"
    if wanted:
        raise ConfigError(f"graphs: on: not possible here: {reason}; set graphs to auto")
    logging.warning(f"graphs: decoding goes without them, which is slower, and answers depend on batches: {reason}")
    return engine


def tolerance(llm: LLM) -> float:
    """Of the self-check, by the precision of the products."""
    rounded = llm.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return COARSE_TOLERANCE if rounded else TOLERANCE.get(llm.dtype, COARSE_TOLERANCE)


def _is_llama(lm: Any) -> bool:
    config = lm.config
    ropes = f"{getattr(config, 'rope_scaling', None)} {getattr(config, 'rope_parameters', None)}"
    return (
        config.model_type in FAMILIES
        and getattr(config, "hidden_act", None) == "silu"
        and not (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))
        and not any(kind in ropes for kind in ("dynamic", "longrope"))  # cosines depend on the sequence's length
        and all(_is_plain(module) for module in lm.base_model.layers.modules())
    )


def _is_plain(module: torch.nn.Module) -> bool:
    """False for a quantised linear layer, whose weight is no matrix of floats; other modules do not matter here."""
    base: Any = module.get_base_layer() if hasattr(module, "get_base_layer") else module  # type: ignore[operator]
    weight = getattr(base, "weight", None)
    linear = isinstance(base, torch.nn.Linear) or "linear" in type(base).__name__.lower()
    return not linear or (isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2)


@torch.no_grad()
def self_check(engine: Engine, reference: Engine | None = None) -> float:
    """How far the logits of eight positions and a step behind them are from transformers' (or those of ``reference``),
    relative to their length."""
    llm = engine.llm
    if reference is None:
        reference = TransformersEngine(llm, None if engine.ids is None else engine.ids.tolist())
    token = torch.arange(9, device=llm.device) * (llm.vocab_size // 9)
    last = torch.tensor([engine.eos_ids[0]], device=llm.device)
    training = [module for module in llm.lm.modules() if module.training]
    llm.lm.eval()  # LoRA's dropout would make a difference, too
    try:
        found, expected = [_two_passes(one, llm.embed(token[None, :8]), last) for one in (engine, reference)]
    finally:
        for module in training:
            module.training = True
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def _two_passes(engine: Engine, prefix: Tensor, token: Tensor) -> Tensor:
    first, state = engine.prefill(prefix, torch.tensor([prefix.shape[1]], device=prefix.device))
    return torch.cat([first, engine.step(token, state)])


class CachedState:
    """Keys and values of all positions so far, one row per hypothesis, in transformers' cache."""

    def __init__(self, cache: Any, mask: Tensor, positions: Tensor, depth: int) -> None:
        self.cache = cache  # transformers.DynamicCache
        self.mask = mask  # (R,P) bool: which cached slots a row may attend to
        self.positions = positions  # (R,) of the next token
        self.depths = [depth] * len(positions)

    def select(self, rows: Sequence[int]) -> None:
        """See ``State``."""
        if list(rows) == list(range(len(self.depths))):
            return
        (index,) = upload(self.mask.device, rows)
        self.cache.batch_select_indices(index)
        self.mask, self.positions = self.mask[index], self.positions[index]
        self.depths = [self.depths[row] for row in rows]


class TransformersEngine(Engine):
    """Any causal LLM: transformers' own modules and cache, whose rows are copied when beams fork."""

    @torch.no_grad()
    def prefill(
        self, prefix: Tensor, lengths: Tensor, drafts: Sequence[Sequence[int]] | None = None
    ) -> tuple[Tensor, CachedState]:
        """See ``Engine``."""
        from transformers import DynamicCache

        if drafts is not None:
            self._refuse("draft", "draft.kind: none")
        positions = torch.arange(prefix.size(1), device=prefix.device)
        mask = positions < lengths[:, None]
        state = CachedState(DynamicCache(), mask, lengths.clone(), self.llm.num_layers)
        hidden = self._run(prefix.to(self.llm.dtype), positions.expand(mask.shape), state)
        return self._logits(hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]), state

    @torch.no_grad()
    def step(self, tokens: Tensor, state: CachedState) -> Tensor:
        """See ``Engine``."""
        # A row's new slot may lie behind padding of its prefix: the mask hides those slots, the position skips them.
        state.mask = F.pad(state.mask, (0, 1), value=True)
        embeds = self.llm.embed(tokens if self.ids is None else self.ids[tokens])
        hidden = self._run(embeds[:, None], state.positions[:, None], state)
        state.positions = state.positions + 1
        return self._logits(hidden[:, 0])

    def verify(self, tokens: Tensor, lengths: Sequence[int], state: CachedState) -> Tensor:
        """Raises ConfigError."""
        self._refuse("draft", "draft.kind: none")

    def with_exits(self, options: ExitOptions) -> Engine:
        """See ``Engine``."""
        if options.mode != "never":
            self._refuse("exit", "exit.mode: never")
        return copy.copy(self)

    def take_over(self) -> None:
        """Nothing: the LLM's own weights are what runs."""

    def _refuse(self, option: str, remedy: str) -> NoReturn:
        raise ConfigError(f"{option}: needs a Llama-type LLM and llm_conf.fused_decoding: true; set {remedy}")

    def _run(self, embeds: Tensor, positions: Tensor, state: CachedState) -> Tensor:
        """Positions (R,P) of embeddings (R,P,D) on top of the cache -> last hidden states (R,P,D)."""
        with lora_precision(self.llm.lm):
            return self.llm.transformer(
                inputs_embeds=embeds,
                attention_mask=state.mask,
                position_ids=positions,
                past_key_values=state.cache,
                use_cache=True,
            ).last_hidden_state

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.llm.logits(hidden)
        return logits if self.ids is None else logits[:, self.ids]
