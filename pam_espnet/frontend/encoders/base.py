"""The contract every audio encoder meets: a frozen network from waveforms to hidden states at a fixed frame rate.

Dimension letters: B utterances, N samples, T encoder frames, H hidden layers, D width.

A new encoder subclasses :class:`AbsEncoder`, builds its network in ``__init__``, ends with ``self.finish(...)`` and
implements two methods, ``output_lengths`` and ``hidden_states``. The base class freezes the weights, chooses layers and
sets everything beyond each utterance's end to zero, in the waveform and in the hidden states.

The promise: an utterance's hidden states do not depend on its neighbours in the batch (padded = unpadded). The base
class cannot keep it alone: ``hidden_states`` has to mask after every convolution, normalise and attend within each
utterance's own length, and reverse recurrent layers from each utterance's own end.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from pam_espnet.errors import CheckpointError, ConfigError
from pam_espnet.fileio import read_json
from pam_espnet.transfer import send

MODEL_STAGE = "./run.sh --stage 1 --stop_stage 1"


class AbsEncoder(torch.nn.Module, ABC):
    """A frozen encoder of waveforms; it may also have ``layer_widths``, see ``EncoderSpec``."""

    sample_rate: int  # of the waveforms it expects, Hz
    frame_rate: float  # hidden states per second, Hz
    width: int  # D, the width of every hidden state
    num_layers: int  # H, how many are emitted
    layers: tuple[int, ...]  # which hidden states of the model are emitted (0 = what enters the first block)
    # Whether its sub-modules may be bfloat16: then ``hidden_states`` casts to ``dtype`` what enters the first layer.
    runs_in_bfloat16 = False
    host_lengths: Tensor  # (B,) samples of the batch at work, on the host: reading them waits for no device
    dtype = torch.float32  # of the layers and the hidden states; features before the first layer are always float32

    def finish(
        self, *, layers: Sequence[int] | None, available: int, width: int, frame_rate: float, sample_rate: int = 16000
    ) -> None:
        """Fill the attributes and freeze the weights; the last line of a subclass's ``__init__``.

        Args:
            layers: indices of the hidden states to emit, in this order; None for all of them.
            available: how many hidden states the model has.
            width: D.
            frame_rate, sample_rate: Hz.

        Raises ConfigError: an index out of range or given twice.
        """
        chosen = tuple(range(available)) if layers is None else tuple(layers)
        if not chosen or len(set(chosen)) != len(chosen) or any(not 0 <= index < available for index in chosen):
            raise ConfigError(
                f"layers: {list(chosen)} for {type(self).__name__}; allowed are distinct indices from 0 to "
                f"{available - 1} (leave the option out for all {available})"
            )
        self.layers, self.num_layers = chosen, len(chosen)
        self.width, self.frame_rate, self.sample_rate = width, float(frame_rate), sample_rate
        self.requires_grad_(False)
        self.eval()

    @abstractmethod
    def output_lengths(self, num_samples: Tensor) -> Tensor:
        """Frames (B,) of clips of ``num_samples`` (B,); both integers, at least 1."""

    @abstractmethod
    def hidden_states(self, wave: Tensor, lengths: Tensor) -> Sequence[Tensor]:
        """All hidden states, or those up to ``max(self.layers)``, each (B,T,D).

        T must be at least the largest of ``output_lengths(lengths)``; the caller drops what is beyond an utterance's
        own frames.

        Args:
            wave: (B,N) float32 in [-1, 1], zero beyond each utterance's length.
            lengths: (B,) samples, on the same device; ``host_lengths`` has them for what the host decides.
        """

    def use_dtype(self, dtype: torch.dtype) -> AbsEncoder:
        """Let the sub-modules compute in ``dtype``; what the encoder itself holds (mel filters) stays float32."""
        if dtype != self.dtype:
            for module in list(self.modules()):
                if parametrize.is_parametrized(module):  # a product of weights, rounded once and not in each factor
                    for name in list(module.parametrizations):  # type: ignore[arg-type]
                        parametrize.remove_parametrizations(module, name)
            for child in self.children():
                child.to(dtype)
            self.requires_grad_(False)
            self.dtype = dtype
        return self

    @torch.no_grad()
    def forward(self, wave: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B,H,T,D) of the chosen layers in ``dtype``, zero beyond each utterance's frames; frames (B,).

        Args:
            wave: (B,N) float32 in [-1, 1]; anything beyond an utterance's length.
            lengths: (B,) samples; on the host, or it waits for the device here.
        """
        if wave.dim() != 2 or lengths.shape != wave.shape[:1]:
            raise ValueError(f"wave {tuple(wave.shape)} and lengths {tuple(lengths.shape)}: expected (B,N) and (B,)")
        self.host_lengths = lengths.cpu()
        longest = int(self.host_lengths.max())
        if int(self.host_lengths.min()) < 1 or longest > wave.shape[1]:
            raise ValueError(f"lengths must be within 1..{wave.shape[1]} samples, got {lengths.tolist()}")
        host_frames = self.output_lengths(self.host_lengths)
        lengths, frames = send(torch.stack([self.host_lengths, host_frames]), wave.device)
        # Cut the common tail as well: what a caller padded beyond the longest utterance costs nothing.
        wave = wave[:, :longest].float().masked_fill(padding_mask(lengths, longest), 0.0)
        # The same also inside a mixed-precision training step: the cached features are made outside of one.
        with torch.autocast(wave.device.type, enabled=False):
            states = self.hidden_states(wave, lengths)
        num_frames = int(host_frames.max())
        hidden = torch.stack([states[index][:, :num_frames] for index in self.layers], dim=1)
        return hidden.masked_fill(padding_mask(frames, num_frames)[:, None, :, None], 0.0), frames

    def train(self, mode: bool = True) -> AbsEncoder:
        """Stay in evaluation mode, whatever the surrounding model is switched to."""
        return super().train(False)

    def weights_sha256(self) -> str:
        """SHA-256 over the names, types, shapes and bytes of all weights; part of the feature cache's key, so it is
        taken before ``use_dtype``."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def layer_dtype(choice: str, encoder: type[AbsEncoder], device: torch.device | str) -> torch.dtype:
    """The precision of an encoder's layers by the option ``encoder_dtype``: "float32", "bfloat16", or "auto", which is
    bfloat16 on GPUs that compute it natively, for encoders that can, and float32 elsewhere.
    Raises ConfigError: another name, or bfloat16 for an encoder that computes in float32 only."""
    if choice not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"frontend_conf.encoder_dtype: {choice!r}; choose auto, float32 or bfloat16")
    if choice == "bfloat16" and not encoder.runs_in_bfloat16:
        raise ConfigError(
            f"frontend_conf.encoder_dtype: {encoder.__name__} computes in float32 only\n"
            "  -> write auto: on a GPU the others are bfloat16 then"
        )
    if choice == "auto" and encoder.runs_in_bfloat16 and torch.device(device).type == "cuda":
        choice = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return torch.bfloat16 if choice == "bfloat16" else torch.float32


def padding_mask(lengths: Tensor, size: int) -> Tensor:
    """(B,size) bool, True where an index is at or beyond its row's length (B,)."""
    return torch.arange(size, device=lengths.device)[None, :] >= lengths[:, None]


def model_folder(path: str | Path) -> Path:
    """The local folder of a converted model.
    Raises ConfigError: no such folder; names the recipe's stage that makes it."""
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(
            f"path: no model folder {folder} (relative paths start at the recipe's directory)\n"
            f"  -> the recipe's first stage downloads and converts the models: {MODEL_STAGE}"
        )
    return folder


def model_folder_or_id(path: str | Path) -> str:
    """A local folder, or else a Hugging Face id such as ``microsoft/wavlm-base-plus``, to be given to transformers.
    Raises ConfigError: neither an existing folder nor the shape of an id."""
    text = str(path)
    # "downloads/gone" has the shape of an id too; where its first part is a folder, a folder was meant.
    names_folder = Path(text).exists() or ("/" in text and Path(text).parent.is_dir())
    if not names_folder and re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", text):
        return text
    return str(model_folder(path))


def load_pretrained(cls: Any, path: str | Path, **options: Any) -> Any:
    """``cls.from_pretrained`` of a transformers class, in float32, with every weight it needs.

    Args:
        path: local folder or Hugging Face id.
        options: further arguments of ``from_pretrained``.

    Raises:
        ConfigError: no such folder, or transformers cannot find or read the model.
        CheckpointError: the checkpoint is truncated or lacks weights of the model.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging

    source = model_folder_or_id(path)
    # Its own report would list every weight that is rightly left out (a decoder, a pre-training head) as a warning.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, report = cls.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"path: transformers cannot load {source} as {cls.__name__}: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{source}: the weights cannot be read ({error}); fetch or convert them again") from error
    finally:
        logging.set_verbosity(verbosity)
    # Used in training alone, and absent from several published checkpoints.
    missing = sorted(key for key in report["missing_keys"] if not key.endswith("masked_spec_embed"))
    if missing:
        raise CheckpointError(f"{source}: {len(missing)} weights are missing, for example {', '.join(missing[:5])}")
    return model


def load_extractor(cls: Any, path: str | Path) -> Any:
    """``cls.from_pretrained`` of a transformers feature extractor, for its sampling rate and normalisation.
    Raises ConfigError: the model has no readable preprocessor_config.json."""
    try:
        return cls.from_pretrained(model_folder_or_id(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"path: {path} has no preprocessor_config.json that can be read: {error}") from error


def load_folder(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and the tensors of ``model.safetensors`` of a converted model's folder.
    Raises ConfigError: no such folder; CheckpointError: a file is missing or unreadable."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = model_folder(path)
    try:
        return read_json(folder / "config.json"), load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: incomplete model folder ({error})\n  -> delete it and make it again: {MODEL_STAGE}"
        ) from error


def load_weights(net: torch.nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Fill ``net`` from ``tensors`` of the folder ``path``.
    Raises CheckpointError: names or shapes differ; lists them."""
    try:
        net.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}/model.safetensors does not fit {type(net).__name__}: {error}\n"
            f"  -> delete the folder and make it again: {MODEL_STAGE}"
        ) from error
