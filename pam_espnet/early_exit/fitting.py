"""Calibrate early exit of a trained experiment on development data; see ``decoder.calibration`` for what is fitted.

Dimension letters: B utterances, N tokens, C candidate blocks, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pam_espnet.data.datadir import DataDir
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.early_exit.answer_states import answer_states, reference_answers
from pam_espnet.engine.calibration import Calibration, CostModel, Judgement, apply_map, fit_gate, fit_map, judge
from pam_espnet.errors import ConfigError
from pam_espnet.llm.llm import LLMDecoder

RIDGES = (0.01, 0.1, 1.0)
FEWEST_TOKENS = 200  # on either half; with fewer the judgement would be a guess


@dataclass(frozen=True)
class Observed:
    """The LLM's states where it names the tokens of reference answers, without gradient.

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


def observe(speech: SpeechLLM, data_dir: str | Path, layers: Sequence[int], batch_size: int = 8) -> Observed:
    """Run the reference answers of a formatted data directory through the LLM.

    Raises:
        DataError: audio of another sample rate than the model's.
    """
    data = DataDir.load(data_dir)
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

    Raises:
        ConfigError: a block that the LLM, of ``blocks``, does not have, or its last.
    """
    chosen = tuple(sorted(set(layers))) or tuple(range(blocks // 2, blocks, 2))
    if chosen[0] < 1 or chosen[-1] >= blocks:
        raise ConfigError(f"--layers: {list(chosen)}; the blocks before the last are 1 to {blocks - 1}")
    return chosen


def cost_model(decoder: LLMDecoder) -> CostModel:
    """Costs from the numbers of weights; LoRA is merged when it decodes and does not count."""

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for name, p in module.named_parameters() if "lora_" not in name)

    layers = decoder.transformer.layers
    memory = count(layers[0].self_attn.k_proj) + count(layers[0].self_attn.v_proj)
    return CostModel.of([count(layer) for layer in layers], decoder.lm.get_output_embeddings().weight.numel(), memory)


def calibrate(
    observed: Observed, layers: Sequence[int], decoder: LLMDecoder, precision: float, use_maps: bool
) -> tuple[Calibration, Judgement]:
    """Maps and gates from the utterances with even index, their judgement from the others.

    The ridge is the one with which most tokens of a held-out third of the fitted half become the last block's.

    Args:
        observed: at ``layers``.
        layers: candidate blocks.
        decoder: whose final norm and output layer speak.
        precision: wanted among the tokens that leave.
        use_maps: False leaves hidden states as they are, the setting of arXiv 2412.01455.

    Raises:
        ConfigError: too few tokens.
    """
    norm, head = _on(decoder, decoder.final_norm), _on(decoder, decoder.logits)
    even = observed.utterance % 2 == 0
    fit, rest = observed.take(even), observed.take(~even)
    if min(len(fit.last), len(rest.last)) < FEWEST_TOKENS:
        raise ConfigError(f"{len(observed.last)} tokens are too few to calibrate on; each half needs {FEWEST_TOKENS}")
    tokens, rest_tokens = head(norm(fit.last)).argmax(-1), head(norm(rest.last)).argmax(-1)
    inner = (fit.utterance // 2) % 3 > 0
    maps, gates = [], []
    for layer, states in zip(layers, fit.hidden, strict=True):
        spoken = states
        if use_maps:
            scores = {}
            for ridge in RIDGES:
                matrix = fit_map(states[inner], fit.last[inner], ridge)
                found = head(norm(apply_map(matrix, states[~inner]))).argmax(-1)
                scores[ridge] = float((found == tokens[~inner]).float().mean())
            best = max(scores, key=scores.__getitem__)
            maps.append(fit_map(states, fit.last, best))
            # What the gate learns to foretell are maps that meet new tokens, not those that they were fitted to.
            spoken = torch.empty_like(states)
            for part in (inner, ~inner):
                spoken[part] = apply_map(fit_map(states[~part], fit.last[~part], best), states[part])
        agrees = head(norm(spoken)).argmax(-1) == tokens
        logging.info(f"block {layer}: {float(agrees.float().mean()):.1%} of the last block's tokens")
        gates.append(fit_gate(norm(states), agrees))
    calibration = Calibration(tuple(layers), torch.stack(maps) if use_maps else None, torch.stack(gates), None)
    verdict = judge(calibration, rest.hidden, rest_tokens, norm, head, cost_model(decoder), precision)
    return Calibration(calibration.layers, calibration.maps, calibration.gates, verdict.threshold), verdict


def _on(decoder: LLMDecoder, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``function`` on the decoder's device and in its dtype, for tensors that are kept on the CPU in float32."""

    def run(hidden: Tensor) -> Tensor:
        with torch.no_grad():
            return function(hidden.to(decoder.device, decoder.dtype)).float().cpu()

    return run
