"""Small transfers between host and device: whole numbers up without waiting, a step's results down in one piece.

A transfer from the device makes the host wait for all that was asked of it before, so a step has one; what the host
knows itself (which rows, which slots) is computed there.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

HOST = ("cpu",)  # types of devices whose memory is the host's


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``; on a CPU the same memory."""
    if device.type in HOST:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)  # from memory that is not pinned the host would wait


def upload(device: torch.device, *numbers: Sequence[int] | np.ndarray) -> Sequence[Tensor]:
    """Sequences of whole numbers, each as a tensor of its length; all in one transfer."""
    arrays = [np.asarray(one, dtype=np.int64) for one in numbers]
    return send(torch.from_numpy(np.concatenate(arrays)), device).split([len(one) for one in arrays])


def download(values: Tensor, *indices: Tensor) -> list[Any]:
    """float32 ``values`` and ``indices`` below 2^31, of any shapes, as (nested) lists; all in one transfer."""
    if values.device.type in HOST:
        return [one.tolist() for one in (values, *indices)]
    tensors = [values.contiguous().view(torch.int32), *(one.int() for one in indices)]
    parts = torch.cat([one.flatten() for one in tensors]).cpu().split([one.numel() for one in tensors])
    first, *rest = (part.view(one.shape) for part, one in zip(parts, tensors, strict=True))
    return [first.view(torch.float32).tolist(), *(one.tolist() for one in rest)]
