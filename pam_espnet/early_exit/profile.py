"""What every block would have said at each token of given answers, compared with what the last block says.

Three readings of the residual stream, all through the LLM's own final norm and output layer: *bare*, after each block
(Shan et al., arXiv 2412.01455); *mapped*, after the candidate blocks of a calibration, with its map; and *inner*,
between the attention and the feed-forward network of each block, an analysis probe that nothing decodes with.

Dimension letters: N tokens, P points of reading, C candidate blocks, K tokens of a beam's size, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pam_espnet.data.datadir import DataDir
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.early_exit.answer_states import answer_states
from pam_espnet.engine.calibration import Calibration
from pam_espnet.engine.exits import ExitOptions, ExitPolicy
from pam_espnet.llm.llm import LLM

PLACES = ("first", "later", "end")  # of a token: it begins a word, goes on with one, ends the answer
PATIENCES = (2, 3)


@dataclass(frozen=True)
class Reading:
    """The blocks at P points against the last one.

    Attributes:
        same: (P,N) bool, whether the most likely token is the last block's.
        overlap: (P,N) share of the last block's K most likely tokens among the point's K most likely ones.
    """

    same: Tensor
    overlap: Tensor


@dataclass(frozen=True)
class Profile:
    """Of one test set.

    Attributes:
        task: of each of N tokens.
        place: of each, one of ``PLACES``.
        step: (N,) bool; False for the first token of an answer, which decoding takes from the prefix at full depth.
        layers: C candidate blocks.
        bare: at every block.
        inner: at every block; None where the LLM has no such point.
        mapped: at the candidate blocks; None without maps.
        sureness: confidence, entropy, gate -> (C,N), what is compared with a threshold.
        patience: number of candidates that must agree -> (C,N) bool, whether a token may leave there.
    """

    task: Sequence[str]
    place: Sequence[str]
    step: Tensor
    layers: tuple[int, ...]
    bare: Reading
    inner: Reading | None
    mapped: Reading | None
    sureness: Mapping[str, Tensor]
    patience: Mapping[int, Tensor]

    def right(self) -> Tensor:
        """(C,N) whether a token that leaves at a candidate block is the last block's."""
        return self.mapped.same if self.mapped is not None else self.bare.same[[layer - 1 for layer in self.layers]]


def places(tokenizer: Any, tokens: Sequence[int], end_ids: Collection[int]) -> list[str]:
    """Where each token of an answer stands, see ``PLACES``; a token with which the text has a word more begins one."""
    found, words = [], 0
    for count, token in enumerate(tokens, start=1):
        if token in end_ids:
            found.append("end")
            continue
        before = words
        words = len(tokenizer.decode(list(tokens[:count]), clean_up_tokenization_spaces=False).split())
        found.append("first" if words > before else "later")
    return found


def profile(
    speech: SpeechLLM,
    data: DataDir,
    answers: Mapping[str, Sequence[int]],
    layers: Sequence[int],
    calibration: Calibration | None,
    beam_size: int,
    batch_size: int = 8,
) -> Profile:
    """Run ``answers`` through all blocks once.

    Args:
        speech: the model.
        data: formatted data directory.
        answers: token ids by utterance.
        layers: candidate blocks; those of the calibration where there is one.
        calibration: its maps and gates, on the model's device.
        beam_size: K.
        batch_size: utterances run together.

    Raises:
        ConfigError: a candidate block that the LLM does not have, or its last one.
        DataError: audio of another sample rate than the model's.
    """
    decoder = speech.model.decoder
    policies = _policies(speech, layers, calibration)
    parts: dict[str, list[Reading]] = {"bare": [], "inner": [], "mapped": []}
    sureness: dict[str, list[Tensor]] = {mode: [] for mode in ("confidence", "entropy", "gate") if mode in policies}
    patience: dict[int, list[Tensor]] = {count: [] for count in PATIENCES if str(count) in policies}
    for states in answer_states(speech, data, answers, batch_size):
        last = _top(decoder.exit_logits(states.blocks[-1]), beam_size)
        parts["bare"].append(_read(decoder, states.blocks, last))
        if states.inner:
            parts["inner"].append(_read(decoder, states.inner, last))
        candidates = {layer: states.blocks[layer - 1] for layer in layers}
        if calibration is not None and calibration.maps is not None:
            mapped = [calibration.mapped(layer, hidden) for layer, hidden in candidates.items()]
            parts["mapped"].append(_read(decoder, mapped, last))
        for mode, rows in sureness.items():
            rows.append(torch.stack([policies[mode].measure(layer, hidden) for layer, hidden in candidates.items()]))
        for count, opened in patience.items():
            opened.append(_patient(policies[str(count)], candidates))
    keys = data.utterances
    return Profile(
        task=[data.utt2task[key] for key in keys for _ in answers[key]],
        place=[place for key in keys for place in places(decoder.tokenizer, answers[key], decoder.eos_ids)],
        step=torch.tensor([at > 0 for key in keys for at in range(len(answers[key]))]),
        layers=tuple(layers),
        bare=_joined(parts["bare"]),
        inner=_joined(parts["inner"]) if parts["inner"] else None,
        mapped=_joined(parts["mapped"]) if parts["mapped"] else None,
        sureness={mode: torch.cat(rows, dim=1).cpu() for mode, rows in sureness.items()},
        patience={count: torch.cat(rows, dim=1).cpu() for count, rows in patience.items()},
    )


def _policies(speech: SpeechLLM, layers: Sequence[int], calibration: Calibration | None) -> dict[str, ExitPolicy]:
    """Those that decoding would use, by mode; patience by its number."""
    decoder, chosen = speech.model.decoder, tuple(layers)
    options = {mode: ExitOptions(mode, chosen) for mode in ("confidence", "entropy")}
    for count in PATIENCES:
        if count <= len(chosen):
            options[str(count)] = ExitOptions("patience", chosen, patience=count)
    if calibration is not None:
        options["gate"] = ExitOptions("gate", calibration="given")
    return {
        mode: ExitPolicy(one, decoder.num_layers, decoder.final_norm, decoder.logits, calibration)
        for mode, one in options.items()
    }


def _patient(policy: ExitPolicy, candidates: Mapping[int, Tensor]) -> Tensor:
    """(C,N) whether enough candidates in a row agree, every token taken for an utterance of its own."""
    some = next(iter(candidates.values()))
    policy.begin(len(some), some.device)
    everyone = torch.arange(len(some), device=some.device)
    return torch.stack([policy.decide(layer, everyone, hidden) for layer, hidden in candidates.items()])


def _read(decoder: LLM, states: Sequence[Tensor], last: Tensor) -> Reading:
    """Tokens that P states (N,D) name, against ``last`` (N,K), the last block's most likely ones."""
    same, overlap = [], []
    for hidden in states:
        top = _top(decoder.exit_logits(hidden), last.shape[1])
        same.append(top[:, 0] == last[:, 0])
        overlap.append((top[:, :, None] == last[:, None]).any(dim=1).float().mean(dim=1))
    return Reading(torch.stack(same).cpu(), torch.stack(overlap).cpu())


def _top(logits: Tensor, count: int) -> Tensor:
    """Logits (N,V) -> the most likely tokens (N,K), best first."""
    return logits.topk(min(count, logits.shape[1]), dim=-1).indices


def _joined(parts: Sequence[Reading]) -> Reading:
    return Reading(torch.cat([one.same for one in parts], dim=1), torch.cat([one.overlap for one in parts], dim=1))
