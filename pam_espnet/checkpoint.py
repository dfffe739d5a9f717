"""What training changed, as safetensors; loaded strictly, with a report of what came from where."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from pam_espnet.errors import CheckpointError
from pam_espnet.fileio import atomic_path

MODEL_FILE = "model.safetensors"


def save_trained(state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically; ``metadata`` is kept in the header."""
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}
    with atomic_path(path) as tmp:
        save_file(tensors, tmp, metadata={"format": "pt", **(metadata or {})})


def read_trained(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file; a missing or truncated one is a CheckpointError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint\n  -> train first: ./run.sh --stage 3 --stop_stage 3")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged ({error})\n  -> remove it and run stage 3 again") from error


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> str:
    """Load ``state`` into ``model``; every trained tensor must be there with its shape, and nothing else.

    Returns:
        a one-line report: how many tensors and parameters were loaded, per top-level part, and from where.

    Raises:
        CheckpointError: naming missing, unexpected and wrongly shaped tensors (at most ten of each).
    """
    own = model.state_dict()
    wrong_shape = [
        f"{name}: checkpoint {tuple(t.shape)}, model {tuple(own[name].shape)}"
        for name, t in state.items()
        if name in own and own[name].shape != t.shape
    ]
    problems = {
        "missing in the checkpoint": sorted(set(own) - set(state)),
        "not in the model": sorted(set(state) - set(own)),
        "of another shape": wrong_shape,
    }
    lines = [
        f"  {len(names)} {what}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
        for what, names in problems.items()
        if names
    ]
    if lines:
        raise CheckpointError(
            f"{source}: does not fit this model\n"
            + "\n".join(lines)
            + "\n  -> use the config.yaml that lies beside the checkpoint, or train again"
        )
    model.load_state_dict(dict(state))
    parts: dict[str, int] = {}
    for name, tensor in state.items():
        parts[name.split(".")[0]] = parts.get(name.split(".")[0], 0) + tensor.numel()
    report = f"loaded {len(state)} tensors from {source}: " + ", ".join(f"{k} {v:,}" for k, v in parts.items())
    logging.info(report)
    return report
