"""The end of training: ESPnet's averaged checkpoint becomes ``model.safetensors``."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pam_espnet.errors import CheckpointError
from pam_espnet.fileio import MODEL_FILE, read_trained, save_trained
from pam_espnet.train.step_checkpoint import disk_errors


def export_trained(exp_dir: Path, criteria: Sequence[Sequence[str]]) -> Path:
    """Write ``<exp_dir>/model.safetensors`` from the n-best average by the first of ESPnet's ``best_model_criterion``.
    Raises CheckpointError: there is no averaged model, or its tensors are not finite."""
    phase, key, _ = criteria[0]
    averaged = exp_dir / f"{phase}.{key}.ave.pth"
    if not averaged.exists():
        found = sorted(path.name for path in exp_dir.glob("*.ave*.pth"))
        raise CheckpointError(f"{averaged}: no such file (found: {', '.join(found) or 'none'})\n  -> run stage 3 again")
    return export_state(averaged, exp_dir / MODEL_FILE)


def export_state(source: Path, target: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write one of ESPnet's checkpoints, ``source``, as the safetensors file ``target``; returns ``target``.

    A file that holds these tensors already is left alone: decodings identify their model by the hash of its bytes, and
    safetensors does not write its header in the same order every time.
    """
    state = torch.load(source, map_location="cpu", weights_only=True)
    if broken := not_finite(state):
        raise CheckpointError(f"{source}: {len(broken)} tensors are not finite ({broken[0]}, ...): training diverged")
    if target.exists() and _equal(read_trained(target), state):
        logging.info(f"{target}: holds {source.resolve().name} already")
        return target
    with disk_errors(target):
        save_trained(state, target, {"source": source.resolve().name, **(metadata or {})})
    logging.info(f"wrote {target} ({len(state)} tensors) from {source.resolve().name}")
    return target


def not_finite(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that have values which are NaN or infinite."""
    return [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]


def _equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
