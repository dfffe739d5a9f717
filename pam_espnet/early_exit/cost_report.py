"""The measured costs of a step in the early-exit report: measured once, predictions of speed, tables."""

import logging
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pam_espnet.data.datadir import DataDir
from pam_espnet.data.passport import Passport
from pam_espnet.decode.shards import decoded_of, read_wave
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.early_exit.fitting import CostModel
from pam_espnet.early_exit.measured_cost import MeasuredCost, exit_blocks
from pam_espnet.early_exit.profile import shown_outcomes
from pam_espnet.early_exit.step_times import measure
from pam_espnet.engine.graphs import out_of_memory
from pam_espnet.engine.llama import LlamaEngine
from pam_espnet.errors import ConfigError
from pam_espnet.fileio import read_json, write_json
from pam_espnet.score.report import table


def measured_cost(
    exp: str | Path,
    load: Callable[[], SpeechLLM],
    data_dirs: Sequence[str | Path],
    search: Mapping[str, Any],
    out: str | Path,
    batch_size: int,
    device: str,
    limit: float,
    commit: str | None,
) -> dict[str, Any] | None:
    """Measure, or read from ``<out>/cost.json`` what was measured on this device in this setting.

    Args:
        load: gives the model; not called when nothing is to be run.
        search: options of decoding, whose beam is searched.
        batch_size: utterances run together.
        limit: seconds; 0: measure nothing.

    Returns:
        what the file holds; a ``reason`` in place of costs where the LLM has no exits or the limit is too low; None
        where nothing was measured.
    """
    key = {
        "data": [decoded_of(exp, data_dir) for data_dir in data_dirs],
        "search": dict(search),
        "batch_size": batch_size,
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
    }
    path = Path(out) / "cost.json"
    record = read_json(path) if path.is_file() else {}
    if record.get("key") != key or ("reason" in record and limit > record["limit"]):
        if not limit:
            return None
        record = {"key": key, "limit": limit, "commit": commit, **_measure(load(), data_dirs, batch_size, limit)}
        write_json(path, record)
    return record


def _measure(speech: SpeechLLM, data_dirs: Sequence[str | Path], batch_size: int, limit: float) -> dict[str, Any]:
    engine, beam = speech.full_depth, speech.options.beam
    if not isinstance(engine, LlamaEngine):
        return {"reason": f"transformers must run {type(engine.llm.lm).__name__}, which has no exits then"}
    logging.info(f"costs of a step: measured for at most about {limit:g} s")
    # The utterance of median duration, in every row: a typical prefix.
    sets = [(DataDir.load(data_dir), Passport.load(data_dir)) for data_dir in data_dirs]
    found = [(known.utterances[key]["seconds"], n, key) for n, (data, known) in enumerate(sets) for key in data.wav]
    _, n, key = sorted(found)[len(found) // 2]
    data = sets[n][0]
    audio = speech.encode([read_wave(data, key, speech.model.frontend.sample_rate)], [data.prompt[key]])
    inputs = speech.model.build_inputs([data.prompt[key]], audio, None)
    prefix, lengths = inputs.embeds.repeat(batch_size, 1, 1), inputs.prefix_lengths.repeat(batch_size)
    try:
        cost, steps, counts = measure(engine, prefix, lengths, beam, limit)
    except ConfigError as error:
        return {"reason": str(error)}
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return {"reason": f"batches of {batch_size} do not fit into the GPU's memory; lower --batch_size"}
    setting = {"dtype": engine.precision, "beam_size": beam.beam_size, "positions": prefix.shape[1]}
    return {**setting, **counts, "cost": asdict(cost), "steps": [asdict(one) for one in steps]}


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def predictions(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Speeds that exits would bring, by the numbers of weights and by the measured costs.

    Args:
        report: what ``exit_report.json`` holds; with costs.
    """
    cost = MeasuredCost(**report["measured_cost"]["cost"])
    weights = CostModel(**report["cost_model"])

    def row(name: str, exits: str, depth: float, speed: float, checks: float = 0.0, kind: str = "") -> dict[str, Any]:
        measured = cost.speedup(depth, checks * (kind == "gate"), checks * (kind == "head"))
        keys = ("set", "exit", "mean_depth", "checks", "by_weights", "by_measurement")
        return dict(zip(keys, (name, exits, depth, checks, speed, measured), strict=True))

    def rows() -> Iterator[dict[str, Any]]:
        for block in sorted({*exit_blocks(cost.blocks), *report["layers"]}):
            yield row("", f"fixed:{block}", block, weights.speedup(torch.tensor([float(block)])))
        own = (report["calibration"] or {}).get("threshold")
        for name, tasks in report["sets"].items():
            for task, figures in tasks.items():
                for may, kinds in figures["oracle"]["step"].items():
                    for kind, one in (kinds or {}).items():
                        yield row(f"{name}: {task}", f"oracle, {may}, {kind}", one["mean_depth"], one["speedup"])
                for mode, outcomes in figures["gates"].items():
                    if mode == "never":  # full depth
                        continue
                    for why, one in shown_outcomes(outcomes, own if mode == "gate" else None):
                        at = "" if one["threshold"] is None else f":{one['threshold']:.3g} ({why})"
                        kind = "gate" if mode == "gate" else "head"
                        depth, speed, checks = one["mean_depth"], one["speedup"], one["checks"]
                        yield row(f"{name}: {task}", mode + at, depth, speed, checks, kind)

    return list(rows())


_FITTED = (
    "Milliseconds for all rows of a batch together. Steps are timed in plain beam search, its bookkeeping included. "
    "The output layer and the fill (keys and values of a skipped block) are timed alone; block, checks and constant "
    "are fitted to the steps by least squares, where zero means less than the noise.\n"
)
_PREDICTED = (
    "**Predicted, not measured**: a step with exits against one at full depth, by the numbers of weights as above, and "
    "by the costs that were measured. Checks: per step, linear gates or output layers run to decide. A block runs as "
    "long as one utterance of a batch needs it: where utterances exit at different blocks, as with the oracle and "
    "gates, the prediction is a bound for batches.\n"
)


def cost_text(report: Mapping[str, Any]) -> str:
    """The section of ``EXIT.md``, for a report with ``measured_cost``."""
    record = report["measured_cost"]
    if "reason" in record:
        return f"Not measured: {record['reason']}.\n"
    cost, key = MeasuredCost(**record["cost"]), record["key"]
    full = cost.step(cost.blocks)
    setting = (
        f"Measured on {key['device']}: LLM in {record['dtype']}, batches of {key['batch_size']}, beam "
        f"{record['beam_size']}, prefixes of {record['positions']} positions, {key['threads']} CPU "
        f"thread{'s' * (key['threads'] > 1)}; medians of {record['rounds']} rounds that took turns, {record['tokens']} "
        f"tokens each; commit {record['commit'] or 'unknown'}. "
    )
    parts = {
        f"all {cost.blocks} blocks": cost.blocks * cost.block,
        "output layer": cost.output,
        "constant": cost.constant,
        "**a step at full depth**": full,
        "one block": cost.block,
        "fill of one skipped block": cost.fill,
        "one check by a linear gate": cost.gate,
        "one check by the output layer (confidence, entropy, patience)": cost.head,
    }
    parts |= {f"a step, {one['way']}, as timed": one["milliseconds"] for one in record["steps"] if not _checks(one)}
    costs = [[name, f"{value:.3g}", f"{100 * value / full:.1f}"] for name, value in parts.items()]
    speeds = [
        [
            one["set"] or "any", one["exit"], f"{one['mean_depth']:.1f}", f"{one['checks']:.1f}",
            f"{one['by_weights']:.2f}x", f"{one['by_measurement']:.2f}x",
        ]
        for one in predictions(report)
    ]  # fmt: skip
    head = ("set", "exit", "mean depth", "checks", "predicted by weights", "predicted by measured costs")
    return "\n".join(
        [setting + _FITTED, table(("what", "ms", "share of a step %"), costs), _PREDICTED, table(head, speeds)]
    )


def _checks(steps: Mapping[str, Any]) -> bool:
    return bool(steps["gates"] or steps["heads"])
