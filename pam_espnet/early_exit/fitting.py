"""Early exit of a trained experiment, fitted to development data and judged by a cost model, without a clock.

Maps and gates (``engine.calibration``) are fitted to some utterances and judged on others; what is not predicted to be
worth it is answered with "off".

N tokens, C candidate blocks, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pam_espnet.data.datadir import DataDir
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.early_exit.states import answer_states, reference_answers
from pam_espnet.engine.calibration import Calibration, apply_map
from pam_espnet.errors import ConfigError
from pam_espnet.llm.llm import LLM

RIDGES = (0.01, 0.1, 1.0)
FEWEST_TOKENS = 200  # to fit, and to judge; with fewer the judgement would be a guess
WORTH_IT = 1.05  # predicted speed-up below which the answer is "off"


@dataclass(frozen=True)
class CostModel:
    """Costs of a step in units of one block's weights: blocks of the LLM, the output layer, and the key and value
    projections of one skipped block. LoRA is merged when it decodes and does not count."""

    blocks: int
    head: float
    memory: float

    @classmethod
    def of(cls, llm: LLM) -> CostModel:
        """From the LLM's numbers of weights."""

        def count(module: torch.nn.Module) -> int:
            return sum(p.numel() for name, p in module.named_parameters() if "lora_" not in name)

        layers = llm.transformer.layers
        mean = sum(map(count, layers)) / len(layers)
        memory = count(layers[0].self_attn.k_proj) + count(layers[0].self_attn.v_proj)
        return cls(len(layers), llm.lm.get_output_embeddings().weight.numel() / mean, memory / mean)

    def speedup(self, depths: Tensor, checks: Tensor | float = 0.0) -> float:
        """Steps at full depth against steps at ``depths`` (N,), linear gates counted as free; ``checks`` (N,) is how
        often the output layer was run only to decide whether to exit."""
        cost = depths + (self.blocks - depths) * self.memory + (1 + checks) * self.head
        return float((self.blocks + self.head) / cost.double().mean())


@dataclass(frozen=True)
class Judgement:
    """What gates do to tokens that they were not fitted to.

    Attributes:
        threshold: of the gates' probabilities; None where none was good enough.
        coverage: share of tokens that exit early.
        precision: share of those whose token is the last block's.
        mean_depth: blocks per token.
        speedup: by the cost model, against full depth.
        checks: gates asked per token, whatever they cost.
        found: share of tokens that exit at the first candidate block that predicts the last block's token, or go
            through all blocks where none does: the accuracy of the choice of a block.
    """

    threshold: float | None
    coverage: float
    precision: float
    mean_depth: float
    speedup: float
    checks: float = 0.0
    found: float = 0.0

    @property
    def worth_it(self) -> bool:
        """Whether to use the gates at all."""
        return self.speedup >= WORTH_IT


@dataclass(frozen=True)
class Observed:
    """The LLM's states where it predicts the tokens of reference answers, without gradient.

    Attributes:
        hidden: per candidate block (N,D), before the final norm.
        last: (N,D), of the last block, before the final norm.
        utterance: (N,) index of the utterance.
    """

    hidden: list[Tensor]
    last: Tensor
    utterance: Tensor

    def take(self, chosen: Tensor) -> Observed:
        """The tokens at ``chosen`` (N,) bool."""
        return Observed([states[chosen] for states in self.hidden], self.last[chosen], self.utterance[chosen])

    def halves(self) -> tuple[Observed, Observed]:
        """The utterances with even index, and the others."""
        even = self.utterance % 2 == 0
        return self.take(even), self.take(~even)


def observe(
    speech: SpeechLLM, data_dir: str | Path, layers: Sequence[int], batch_size: int = 8, most: int | None = None
) -> Observed:
    """Run the reference answers of a formatted data directory through the LLM; of about ``most`` utterances, evenly
    drawn. Raises DataError: audio of another sample rate than the model's."""
    data = DataDir.load(data_dir)
    if most is not None:
        data = data.subset(data.utterances[:: -(-len(data) // most)])
    hidden: list[list[Tensor]] = [[] for _ in layers]
    last: list[Tensor] = []
    owners: list[Tensor] = []
    for states in answer_states(speech, data, reference_answers(speech, data), batch_size):
        for kept, layer in zip(hidden, layers, strict=True):
            kept.append(states.blocks[layer - 1].float().cpu())
        last.append(states.blocks[-1].float().cpu())
        owners.append(states.utterance)
    return Observed([torch.cat(parts) for parts in hidden], torch.cat(last), torch.cat(owners))


def candidate_blocks(layers: Sequence[int], blocks: int) -> tuple[int, ...]:
    """``layers`` in order, or every second block of the upper half where there are none.
    Raises ConfigError: a block that the LLM, of ``blocks``, does not have, or its last."""
    chosen = tuple(sorted(set(layers))) or tuple(range(blocks // 2, blocks, 2))
    if chosen[0] < 1 or chosen[-1] >= blocks:
        raise ConfigError(f"--layers: {list(chosen)}; the blocks before the last are 1 to {blocks - 1}")
    return chosen


def calibrate(
    fit: Observed, rest: Observed, layers: Sequence[int], llm: LLM, precision: float, use_maps: bool
) -> tuple[Calibration, Judgement]:
    """Maps and gates from the tokens of ``fit``, their judgement from those of ``rest``.

    The ridge is the one with which most tokens of a held-out third of ``fit`` become the last block's.

    Args:
        fit, rest: of different utterances, at ``layers``, the candidate blocks.
        llm: whose final norm and output layer are read.
        precision: wanted among the tokens that exit.
        use_maps: False leaves hidden states as they are, the setting of arXiv 2412.01455.

    Raises ConfigError: too few tokens.
    """
    norm, head = _on(llm, llm.final_norm), _on(llm, llm.logits)
    if min(len(fit.last), len(rest.last)) < FEWEST_TOKENS:
        counts = f"{len(fit.last)} tokens to fit and {len(rest.last)} to judge"
        raise ConfigError(f"{counts}: too few to calibrate on; each needs {FEWEST_TOKENS}")
    tokens, rest_tokens = head(norm(fit.last)).argmax(-1), head(norm(rest.last)).argmax(-1)
    inner = (fit.utterance // 2) % 3 > 0
    maps, gates = [], []
    for layer, states in zip(layers, fit.hidden, strict=True):
        read = states
        if use_maps:
            scores = {}
            for ridge in RIDGES:
                matrix = fit_map(states[inner], fit.last[inner], ridge)
                found = head(norm(apply_map(matrix, states[~inner]))).argmax(-1)
                scores[ridge] = float((found == tokens[~inner]).float().mean())
            best = max(scores, key=scores.__getitem__)
            maps.append(fit_map(states, fit.last, best))
            # What the gate learns to predict are maps of new tokens, not those that they were fitted to.
            read = torch.empty_like(states)
            for part in (inner, ~inner):
                read[part] = apply_map(fit_map(states[~part], fit.last[~part], best), states[part])
        agrees = head(norm(read)).argmax(-1) == tokens
        logging.info(f"block {layer}: {float(agrees.float().mean()):.1%} of the last block's tokens")
        gates.append(fit_gate(norm(states), agrees))
    calibration = Calibration(tuple(layers), torch.stack(maps) if use_maps else None, torch.stack(gates), None)
    verdict = judge(calibration, rest.hidden, rest_tokens, norm, head, CostModel.of(llm), precision)
    return replace(calibration, threshold=verdict.threshold), verdict


def _on(llm: LLM, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``function`` on the LLM's device and in its dtype, for tensors that are kept on the CPU in float32."""

    def run(hidden: Tensor) -> Tensor:
        with torch.no_grad():
            return function(hidden.to(llm.device, llm.dtype)).float().cpu()

    return run


def fit_map(hidden: Tensor, last: Tensor, ridge: float) -> Tensor:
    """(D+1,D) such that ``[hidden, 1] @ map`` is close to ``last``, both (N,D).

    ``ridge`` times the mean square of a hidden value pulls the map towards the identity; the constant is free.
    """
    count, width = hidden.shape
    start = torch.eye(width + 1, width)
    inputs = torch.cat([hidden, torch.ones(count, 1, dtype=hidden.dtype)], dim=1).double()
    missing = last.double() - inputs @ start.double()
    penalty = torch.full((width + 1,), ridge * float(hidden.double().square().mean()) * count, dtype=torch.double)
    penalty[-1] = 1e-6
    change = torch.linalg.solve(inputs.T @ inputs + penalty.diag(), inputs.T @ missing)
    return (start + change).float()


def fit_gate(normed: Tensor, agrees: Tensor, penalty: float = 1e-2, steps: int = 60) -> Tensor:
    """(D+1,) logistic regression of ``agrees`` (N,) on ``normed`` (N,D), L2 ``penalty`` on the weights, by L-BFGS."""
    scale = normed.std(dim=0).clamp_min(1e-6)
    inputs = normed / scale
    weights = torch.zeros(normed.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = inputs @ weights[:-1] + weights[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, agrees.float())
        value = value + penalty * weights[:-1].square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    fitted = weights.detach()
    return torch.cat([fitted[:-1] / scale, fitted[-1:]])


def outcome(
    opened: Tensor,
    right: Tensor,
    layers: Sequence[int],
    cost: CostModel,
    threshold: float | None = None,
    checked: bool = False,
) -> Judgement:
    """What comes of exiting at the first candidate block that is open.

    Args:
        opened: (C,N) whether a token may exit there.
        right: (C,N) whether the block's most likely token is the last block's.
        layers: the C blocks, from 1.
        cost: of steps.
        threshold: noted in the result.
        checked: every candidate ran the output layer to decide, which counts.
    """
    exits, first = opened.any(dim=0), opened.float().argmax(dim=0)
    good = right.gather(0, first[None])[0][exits].float()
    depths = torch.where(exits, torch.tensor(layers)[first], cost.blocks)
    asked = torch.where(exits, first + 1, len(layers))
    best = torch.where(right.any(dim=0), torch.tensor(layers)[right.float().argmax(dim=0)], cost.blocks)
    return Judgement(
        threshold,
        coverage=float(exits.float().mean()),
        precision=float(good.mean()) if len(good) else 1.0,
        mean_depth=float(depths.float().mean()),
        speedup=cost.speedup(depths, asked if checked else 0.0),
        checks=float(asked.float().mean()),
        found=float((depths == best).float().mean()),
    )


@torch.no_grad()
def judge(
    calibration: Calibration,
    hidden: Sequence[Tensor],
    last_token: Tensor,
    norm: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    cost: CostModel,
    precision: float,
) -> Judgement:
    """The best threshold at which tokens that exit are the last block's often enough, and what it is worth.

    Args:
        calibration: its own threshold does not count.
        hidden: per candidate block (N,D), of tokens that nothing was fitted on.
        last_token: (N,) the last block's most likely tokens.
        norm, head: the final norm, the output layer.
        precision: wanted among the tokens that exit.
    """
    probabilities, right = [], []
    for layer, states in zip(calibration.layers, hidden, strict=True):
        probabilities.append(calibration.probability(layer, norm(states)))
        right.append(head(norm(calibration.mapped(layer, states))).argmax(-1) == last_token)
    best = Judgement(None, 0.0, 1.0, float(cost.blocks), 1.0)
    for threshold in torch.linspace(0.99, 0.2, 80).tolist():
        opened = torch.stack(probabilities) >= threshold  # (C,N)
        found = outcome(opened, torch.stack(right), calibration.layers, cost, threshold)
        if found.precision >= precision and found.speedup > best.speedup:
            best = found
    return best
