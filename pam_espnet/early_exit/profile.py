"""What every block would have predicted at each token of given answers, compared with the last block; what gates would
do, and an oracle.

Two readings of the residual stream, both through the LLM's own final norm and output layer: *bare*, after each block
(Shan et al., arXiv 2412.01455), and *mapped*, after the candidate blocks of a calibration, with its map. An oracle
knows the last block's token: it exits at the first block that predicts it (*first match*), or at the first from which
all later ones do (*saturated*); it bounds what gates can reach. Speeds are bounds by the cost model
(``fitting.CostModel``), not measurements.

N tokens, P points of reading, C candidate blocks, K tokens of a beam's size, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pam_espnet.data.datadir import DataDir
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.early_exit.fitting import CostModel, outcome
from pam_espnet.early_exit.states import answer_states
from pam_espnet.engine.calibration import Calibration
from pam_espnet.engine.exits import ExitOptions, ExitPolicy
from pam_espnet.llm.llm import LLM

KINDS = ("first", "later", "end")  # of a token: it begins a word, continues one, ends the answer
PATIENCES = (2, 3)
ROWS = 4  # rows that must exit together, in the oracle's second bound
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.999)


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
        task, kind: of each of N tokens; the kinds are ``KINDS``.
        step: (N,) bool; False for the first token of an answer, which decoding takes from the prefix at full depth.
        layers: C candidate blocks.
        bare: at every block.
        mapped: at the candidate blocks; None without maps.
        sureness: confidence, entropy, gate -> (C,N), what is compared with a threshold.
        patience: number of candidates that must agree -> (C,N) bool, whether a token may exit there.
    """

    task: Sequence[str]
    kind: Sequence[str]
    step: Tensor
    layers: tuple[int, ...]
    bare: Reading
    mapped: Reading | None
    sureness: Mapping[str, Tensor]
    patience: Mapping[int, Tensor]


def kinds(tokenizer: Any, tokens: Sequence[int], end_ids: Collection[int]) -> list[str]:
    """Of each token of an answer one of ``KINDS``; a token with which the text has a word more begins one."""
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
    """Run ``answers`` (token ids by utterance) through all blocks once.

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
    llm, chosen = speech.model.decoder, tuple(layers)
    options = {mode: ExitOptions(mode, chosen) for mode in ("confidence", "entropy")}
    options |= {str(n): ExitOptions("patience", chosen, patience=n) for n in PATIENCES if n <= len(chosen)}
    if calibration is not None:
        options["gate"] = ExitOptions("gate", calibration="given")
    policies = {
        mode: ExitPolicy(one, llm.num_layers, llm.final_norm, llm.logits, calibration) for mode, one in options.items()
    }
    parts: dict[str, list[Reading]] = {"bare": [], "mapped": []}
    opened: dict[str, list[Tensor]] = {mode: [] for mode in policies}
    for states in answer_states(speech, data, answers, batch_size):
        last = llm.exit_logits(states.blocks[-1]).topk(min(beam_size, llm.vocab_size), dim=-1).indices
        parts["bare"].append(_read(llm, states.blocks, last))
        candidates = {layer: states.blocks[layer - 1] for layer in layers}
        if calibration is not None and calibration.maps is not None:
            mapped = [calibration.mapped(layer, hidden) for layer, hidden in candidates.items()]
            parts["mapped"].append(_read(llm, mapped, last))
        for mode, policy in policies.items():
            if policy.options.mode == "patience":  # every token taken for an utterance
                rows = torch.arange(len(last), device=last.device)
                policy.begin(len(last), last.device)
                found = [policy.decide(layer, rows, hidden) for layer, hidden in candidates.items()]
            else:
                found = [policy.measure(layer, hidden) for layer, hidden in candidates.items()]
            opened[mode].append(torch.stack(found).cpu())
    joined = {mode: torch.cat(rows, dim=1) for mode, rows in opened.items()}
    keys = data.utterances
    return Profile(
        task=[data.utt2task[key] for key in keys for _ in answers[key]],
        kind=[kind for key in keys for kind in kinds(llm.tokenizer, answers[key], llm.eos_ids)],
        step=torch.tensor([at > 0 for key in keys for at in range(len(answers[key]))]),
        layers=chosen,
        bare=_joined(parts["bare"]),
        mapped=_joined(parts["mapped"]) if parts["mapped"] else None,
        sureness={mode: rows for mode, rows in joined.items() if not mode.isdigit()},
        patience={int(mode): rows for mode, rows in joined.items() if mode.isdigit()},
    )


def _read(llm: LLM, states: Sequence[Tensor], last: Tensor) -> Reading:
    """Tokens that P states (N,D) predict, against ``last`` (N,K), the last block's most likely ones."""
    tops = [llm.exit_logits(hidden).topk(last.shape[1], dim=-1).indices for hidden in states]
    same = [top[:, 0] == last[:, 0] for top in tops]
    overlap = [(top[:, :, None] == last[:, None]).any(dim=1).float().mean(dim=1) for top in tops]
    return Reading(torch.stack(same).cpu(), torch.stack(overlap).cpu())


def _joined(parts: Sequence[Reading]) -> Reading:
    return Reading(torch.cat([one.same for one in parts], dim=1), torch.cat([one.overlap for one in parts], dim=1))


def summarise(found: Profile, cost: CostModel, threshold: float | None) -> dict[str, Any]:
    """All figures of a test set by task, as JSON values.

    Groups of tokens: ``all``; ``step``, all but an answer's first; and by kind ``first``, ``later``, ``end``. An empty
    group has no agreement (None). Oracle: ``all`` and ``step``. Gates: ``step``, as only steps can exit.

    Args:
        found: the profile.
        cost: of steps.
        threshold: the gate's own, added to those that are tried.
    """
    def of(task: str) -> Tensor:
        return torch.tensor([name == task for name in found.task])

    return {task: _summary(found, of(task), cost, threshold) for task in sorted(set(found.task))}


def _summary(found: Profile, chosen: Tensor, cost: CostModel, threshold: float | None) -> dict[str, Any]:
    groups = {"all": chosen, "step": chosen & found.step}
    groups |= {kind: chosen & torch.tensor([one == kind for one in found.kind]) for kind in KINDS}
    readings = {"bare": found.bare} | ({} if found.mapped is None else {"mapped": found.mapped})
    at = [layer - 1 for layer in found.layers]
    right = found.bare.same[at] if found.mapped is None else found.mapped.same  # (C,N)
    steps, gates = groups["step"], {}
    for mode, sureness in found.sureness.items():
        own = [threshold] if mode == "gate" and threshold is not None else []
        gates[mode] = [
            outcome((sureness >= at)[:, steps], right[:, steps], found.layers, cost, at, checked=mode != "gate")
            for at in sorted([*own, *(at for at in THRESHOLDS if not own or abs(at - own[0]) > 1e-6)])
        ]
    for count, opened in found.patience.items():
        gates[f"patience {count}"] = [outcome(opened[:, steps], right[:, steps], found.layers, cost, checked=True)]

    def means(table: Tensor) -> dict[str, list[float] | None]:
        return {name: table[:, one].float().mean(dim=1).tolist() if one.any() else None for name, one in groups.items()}

    return {
        "tokens": {name: int(group.sum()) for name, group in groups.items()},
        "agreement": {name: means(one.same) for name, one in readings.items()},
        "overlap": {name: means(one.overlap) for name, one in readings.items()},
        "oracle": {
            name: {
                "every block, bare": oracle(found.bare.same[:, groups[name]], range(1, cost.blocks + 1), cost),
                "candidate blocks": oracle(right[:, groups[name]], found.layers, cost),
            }
            for name in ("all", "step")
        },
        "gates": {mode: [asdict(one) for one in rows] for mode, rows in gates.items()} if steps.any() else {},
    }


def oracle(same: Tensor, layers: Sequence[int], cost: CostModel) -> dict[str, dict[str, float]] | None:
    """Depths and speeds of an oracle that may exit at ``layers``.

    Args:
        same: (P,N) whether the token of each of ``layers`` is the last block's.
        layers: P blocks, from 1.
        cost: of steps.

    Returns:
        for ``first match`` and ``saturated`` the mean depth and the speed-up, of single rows and of ``ROWS`` rows that
        must exit together; None without tokens.
    """
    if not same.shape[1]:
        return None
    same = torch.cat([same, torch.ones(1, same.shape[1], dtype=torch.bool)])  # the last block predicts what none did
    depths = torch.tensor([*layers, cost.blocks])
    found = {}
    for name, table in (("first match", same), ("saturated", same.flip(0).cummin(dim=0).values.flip(0))):
        exited = depths[table.to(torch.int8).argmax(dim=0)]
        together = mean_of_deepest(exited, ROWS)
        found[name] = {
            "mean_depth": float(exited.double().mean()),
            "speedup": cost.speedup(exited),
            "mean_depth_together": together,
            "speedup_together": cost.speedup(torch.tensor([together])),  # costs are linear in the depth
        }
    return found


def mean_of_deepest(depths: Tensor, rows: int) -> float:
    """The mean depth of ``rows`` independent tokens, drawn from ``depths`` (N,), that all go as deep as the deepest."""
    levels = depths.unique()
    below = (depths[None] <= levels[:, None]).double().mean(dim=1) ** rows  # that none is deeper than the level
    return float((levels * below.diff(prepend=torch.zeros(1, dtype=torch.double))).sum())
