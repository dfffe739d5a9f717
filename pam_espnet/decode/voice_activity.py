"""Silero's voice activity model (MIT), with the weights in the safetensors file of the package ``silero-vad``.

The package itself takes one frame per call, through TorchScript, which torch deprecates, and sets torch's threads when
it is imported. A test compares this network with it. (The file's weights are a little older than those of its
TorchScript; on the mini recipe's test sets they find as much speech, and as little in sounds.)

Dimension letters: T frames of 32 ms.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from pam_espnet.errors import ConfigError

RATE, FRAME, CONTEXT = 16000, 512, 64  # Hz, samples of a frame, samples before it that the model sees as well


class VoiceActivity(nn.Module):
    """Frames of a recording to the probability that there is speech; call it with all of them, in their order.

    Raises ConfigError: the package is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)  # real parts of 129 bins, then imaginary ones
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, padding=1, stride=2)
        self.conv3 = nn.Conv1d(64, 64, 3, padding=1, stride=2)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm = nn.LSTM(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)
        weights = load_file(weights_file())
        names = {name: name.replace("lstm_cell", "lstm") + "_l0" * name.startswith("lstm") for name in weights}
        self.load_state_dict({names[name]: weight for name, weight in weights.items()})
        self.eval()
        self.before = np.zeros(CONTEXT, dtype=np.float32)  # the last samples of the call before
        self.state: tuple[Tensor, Tensor] | None = None  # of the LSTM

    @torch.inference_mode()
    def forward(self, frames: np.ndarray) -> np.ndarray:
        """(T, FRAME) float32 at ``RATE`` to probabilities (T,)."""
        contexts = np.concatenate([self.before[None], frames[:-1, -CONTEXT:]])
        self.before = frames[-1, -CONTEXT:].copy()
        x = torch.from_numpy(np.concatenate([contexts, frames], axis=1))[:, None]
        x = self.stft_conv(F.pad(x, (0, CONTEXT), "reflect"))
        x = x.unflatten(1, (2, 129)).square().sum(1).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = conv(x).relu()
        x, self.state = self.lstm(x.transpose(1, 2), self.state)  # (T, 1, 128)
        probabilities: np.ndarray = self.final_conv(x.transpose(1, 2).relu()).sigmoid().flatten().numpy()
        return probabilities


def weights_file() -> Path:
    """Where the installed package has the weights. Raises ConfigError: it is not installed."""
    package = find_spec("silero_vad")
    if package is None or not package.submodule_search_locations:
        raise ConfigError("finding pauses needs the package silero-vad\n  -> tools/setup.sh, or pip install silero-vad")
    return Path(package.submodule_search_locations[0]) / "data" / "silero_vad_16k.safetensors"
