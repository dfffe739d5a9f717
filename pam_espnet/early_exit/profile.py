"""What every block would have predicted at each token of given answers, compared with the last block; what gates would
do, and an oracle.

Two readings of the residual stream, both through the LLM's own final norm and output layer: *bare*, after each block
(Shan et al., arXiv 2412.01455), and *mapped*, after the candidate blocks of a calibration, with its map. An oracle
knows the last block's token: it exits at the first block that predicts it (*first match*), or at the first from which
all later ones do (*saturated*); it bounds what gates can reach. Speeds are bounds by the cost model
(``fitting.CostModel``), not measurements.

N tokens, P points of reading, C candidate blocks, D width.
"""

from collections.abc import Mapping, Sequence
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

PATIENCES = (2, 3)
WORD_STARTS = ("Ġ", "▁")  # what byte-level BPE and SentencePiece write for the blank before a word
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.999)
PRECISIONS = (0.95, 0.99)  # of the tokens that exit, for which tables show the best threshold


@dataclass(frozen=True)
class Profile:
    """Of one test set.

    Attributes:
        task: of each of N tokens.
        step: (N,) bool; False for the first token of an answer, which decoding takes from the prefix at full depth.
        piece: of each token: "first" of a word, "later", or "end" of the answer.
        layers: C candidate blocks.
        bare: (P,N) bool, whether the most likely token is the last block's, at every block.
        mapped: (C,N) the same at the candidate blocks; None without maps.
        sureness: confidence, entropy, gate -> (C,N), what is compared with a threshold.
        patience: number of candidates that must agree -> (C,N) bool, whether a token may exit there.
    """

    task: Sequence[str]
    step: Tensor
    piece: Sequence[str]
    layers: tuple[int, ...]
    bare: Tensor
    mapped: Tensor | None
    sureness: Mapping[str, Tensor]
    patience: Mapping[int, Tensor]


def profile(
    speech: SpeechLLM,
    data: DataDir,
    answers: Mapping[str, Sequence[int]],
    layers: Sequence[int],
    calibration: Calibration | None,
    batch_size: int = 8,
) -> Profile:
    """Run ``answers`` (token ids by utterance) through all blocks once.

    Args:
        layers: candidate blocks; those of the calibration where there is one.
        calibration: its maps and gates, on the model's device.

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
    opened: dict[str, list[Tensor]] = {mode: [] for mode in ("bare", "mapped", *policies)}
    for states in answer_states(speech, data, answers, batch_size):
        last = llm.exit_logits(states.blocks[-1]).argmax(-1)
        opened["bare"].append(torch.stack([llm.exit_logits(one).argmax(-1) == last for one in states.blocks]).cpu())
        candidates = {layer: states.blocks[layer - 1] for layer in layers}
        if calibration is not None and calibration.maps is not None:
            mapped = [calibration.mapped(layer, hidden) for layer, hidden in candidates.items()]
            opened["mapped"].append(torch.stack([llm.exit_logits(one).argmax(-1) == last for one in mapped]).cpu())
        for mode, policy in policies.items():
            if policy.options.mode == "patience":  # every token taken for an utterance
                rows = torch.arange(len(last), device=last.device)
                policy.begin(len(last), last.device)
                found = [policy.decide(layer, rows, hidden) for layer, hidden in candidates.items()]
            else:
                found = [policy.measure(layer, hidden) for layer, hidden in candidates.items()]
            opened[mode].append(torch.stack(found).cpu())
    joined = {mode: torch.cat(rows, dim=1) for mode, rows in opened.items() if rows}
    keys = data.utterances
    return Profile(
        task=[data.utt2task[key] for key in keys for _ in answers[key]],
        step=torch.tensor([at > 0 for key in keys for at in range(len(answers[key]))]),
        piece=[piece for key in keys for piece in pieces(llm, answers[key])],
        layers=chosen,
        bare=joined.pop("bare"),
        mapped=joined.pop("mapped", None),
        sureness={mode: rows for mode, rows in joined.items() if not mode.isdigit()},
        patience={int(mode): rows for mode, rows in joined.items() if mode.isdigit()},
    )


def pieces(llm: LLM, answer: Sequence[int]) -> list[str]:
    """Of each token of an answer: the "first" piece of a word, a "later" one, or the "end" token."""
    names = llm.tokenizer.convert_ids_to_tokens(list(answer))
    found = ["first" if at == 0 or name.startswith(WORD_STARTS) else "later" for at, name in enumerate(names)]
    return ["end" if token in llm.eos_ids else piece for token, piece in zip(answer, found, strict=True)]


def summarise(found: Profile, cost: CostModel, threshold: float | None) -> dict[str, Any]:
    """All figures of a test set by task, as JSON values.

    Groups of tokens: ``all``; ``step``, all but an answer's first; ``first`` and ``later`` pieces of words, of which
    there is agreement alone. An empty group has none (None). Gates: ``step``, as only steps can exit.

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
    groups |= {piece: chosen & torch.tensor([one == piece for one in found.piece]) for piece in ("first", "later")}
    readings = {"bare": found.bare} | ({} if found.mapped is None else {"mapped": found.mapped})
    at = [layer - 1 for layer in found.layers]
    right = found.bare[at] if found.mapped is None else found.mapped  # (C,N)
    steps, gates = groups["step"], {}
    for mode, sureness in found.sureness.items():
        own = [threshold] if mode == "gate" and threshold is not None else []
        gates[mode] = [
            outcome((sureness >= at)[:, steps], right[:, steps], found.layers, cost, at, checked=mode != "gate")
            for at in sorted([*own, *(at for at in THRESHOLDS if not own or abs(at - own[0]) > 1e-6)])
        ]
    nowhere = torch.zeros_like(right[:, steps])  # what a measure has to beat in finding exits, where many have none
    gates["never"] = [outcome(nowhere, right[:, steps], found.layers, cost)]
    for count, opened in found.patience.items():
        gates[f"patience {count}"] = [outcome(opened[:, steps], right[:, steps], found.layers, cost, checked=True)]

    def means(table: Tensor) -> dict[str, list[float] | None]:
        return {name: table[:, one].float().mean(dim=1).tolist() if one.any() else None for name, one in groups.items()}

    return {
        "tokens": {name: int(group.sum()) for name, group in groups.items()},
        "agreement": {name: means(one) for name, one in readings.items()},
        "oracle": {
            name: {
                "every block, bare": oracle(found.bare[:, groups[name]], range(1, cost.blocks + 1), cost),
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

    Returns:
        for ``first match`` and ``saturated`` the mean depth and the speed-up; None without tokens.
    """
    if not same.shape[1]:
        return None
    same = torch.cat([same, torch.ones(1, same.shape[1], dtype=torch.bool)])  # the last block predicts what none did
    depths = torch.tensor([*layers, cost.blocks])
    found = {}
    for name, table in (("first match", same), ("saturated", same.flip(0).cummin(dim=0).values.flip(0))):
        exited = depths[table.to(torch.int8).argmax(dim=0)]
        found[name] = {"mean_depth": float(exited.double().mean()), "speedup": cost.speedup(exited)}
    return found


def shown_outcomes(outcomes: Sequence[Mapping[str, Any]], own: float | None) -> list[tuple[str, Mapping[str, Any]]]:
    """Which thresholds tables show of a measure, and why; ``own`` is the calibrated one."""
    if len(outcomes) == 1:  # patience has none
        return [("", outcomes[0])]
    found = [("calibrated", one) for one in outcomes if one["threshold"] == own]
    found.append(("the right block", most_found(outcomes)))
    exiting = [one for one in outcomes if one["coverage"] > 0]
    for wanted in PRECISIONS:
        if (best := fastest(outcomes, wanted)) is not None:
            found.append((f"precision {wanted:.0%}", best))
        elif exiting:
            found.append(("most precise", max(exiting, key=lambda one: one["precision"])))
            break
    return found


def most_found(outcomes: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The threshold that finds most exit blocks."""
    return max(outcomes, key=lambda one: one["found"])


def fastest(outcomes: Sequence[Mapping[str, Any]], precision: float) -> Mapping[str, Any] | None:
    """The threshold with the greatest speed-up among those at which tokens exit and are right often enough."""
    good = [one for one in outcomes if one["coverage"] > 0 and one["precision"] >= precision]
    return max(good, key=lambda one: one["speedup"], default=None)
