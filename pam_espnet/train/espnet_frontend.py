"""The mixture of encoders as a frontend of ESPnet's own models: waveforms in, features at one frame rate out.

Dimension letters: B utterances, N samples, U frames of features, D width, P prompt-vector width.

``train.espnet_asr`` registers it with ESPnet's ASR task as ``frontend: pam``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import humanfriendly
import torch
from espnet2.asr.frontend.abs_frontend import AbsFrontend
from torch import Tensor

from pam_espnet.config import check_options
from pam_espnet.errors import ConfigError
from pam_espnet.frontend.frontend import PaMFrontend


class MixtureFrontend(AbsFrontend):
    """``PaMFrontend`` with the same prompt for all utterances, or with a fusion that reads none.

    Encoders are in no checkpoint and no optimizer; adapters and fusion are. The prompt vector is in the checkpoint, so
    that a trained model needs no LLM. For several GPUs in one process (``nn.DataParallel``) there is one copy of the
    encoders only: train in a process for each, as ESPnet's recipes do (``--multiprocessing_distributed true``).

    Args:
        encoders: name -> options of ``build_encoder`` (``type``, ``path``, ``layers``, ...).
        fusion: see ``fusion.registry``.
        width: D of the features.
        fs: of the waveforms, Hz, as ESPnet's recipes give it (16000 or "16k").
        frame_rate: of the features, Hz; a multiple or a whole part of every encoder's.
        initial_rms: see PaMFrontend.
        prompt: the one prompt, for ``fusion: pam``; a checkpoint that is loaded brings the vector of its own.
        llm: folder or Hugging Face id of the LLM that makes the prompt vector.
        llm_conf: options of ``LLM.from_pretrained``; those of an experiment whose frontend this one begins with.
        prompt_width: P, where the prompt vector is to come from a checkpoint (training writes it to config.yaml);
            without one the LLM is loaded for the first batch.
        options: further options of PaMFrontend.

    Raises ConfigError: options that cannot work.
    """

    def __init__(
        self,
        encoders: Mapping[str, Mapping[str, Any]],
        fusion: str = "static",
        width: int = 256,
        fs: int | str = 16000,
        frame_rate: float = 50.0,
        initial_rms: float = 1.0,
        prompt: str | None = None,
        llm: str | None = None,
        llm_conf: Mapping[str, Any] | None = None,
        prompt_width: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        about_prompt = {"prompt": prompt, "llm": llm, "llm_conf": llm_conf, "prompt_width": prompt_width}
        given = [name for name, value in about_prompt.items() if value is not None]
        if fusion == "pam" and (prompt is None or llm is None):
            raise ConfigError(
                "frontend_conf: fusion pam needs a prompt, and the llm that reads it\n"
                "  -> add prompt: and llm:, or choose fusion: static"
            )
        if fusion != "pam" and given:
            raise ConfigError(f"frontend_conf: fusion {fusion} does not read {', '.join(given)}\n  -> remove it")
        self._prompt_vector = partial(prompt_vector, prompt or "", llm or "", llm_conf or {})
        vector = torch.zeros(1)  # read by no fusion
        if fusion == "pam":
            vector = self._prompt_vector() if prompt_width is None else torch.full((prompt_width,), torch.nan)
        self.register_buffer("prompt_vector", vector, persistent=fusion == "pam")
        # What config.yaml has to say beside the options that were given.
        self.found_options = {"prompt_width": len(vector)} if fusion == "pam" else {}
        build = partial(PaMFrontend, encoders, fusion, width, len(vector))
        check_options(options, "frontend_conf", build, type(self))
        rate = humanfriendly.parse_size(fs) if isinstance(fs, str) else fs
        self.mixture = build(frame_rate=frame_rate, sample_rate=rate, initial_rms=initial_rms, **options)
        self._initial = {name: tensor.clone() for name, tensor in self.mixture.state_dict().items()}
        self._ready = False  # whether the first batch was seen

    def output_size(self) -> int:
        """D of the features."""
        return self.mixture.output_size()

    def forward(self, input: Tensor, input_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Waveforms (B,N) in [-1, 1] of ``input_lengths`` (B,) samples -> features (B,U,D), zero beyond each
        utterance's length, and lengths (B,). Raises ConfigError: samples are not in that range (first batch)."""
        if not self._ready:
            self._prepare(input)
        vectors = self.prompt_vector.expand(len(input), -1)  # (B,P)
        features = self.mixture(input_lengths, vectors, wave=input)
        return features.embeddings, features.lengths.to(input.device)

    @torch.no_grad()
    def _prepare(self, wave: Tensor) -> None:
        """Checks that need not be made, nor waited for, in every step."""
        if float(wave.abs().max()) > 2:  # resampling may exceed one a little
            raise ConfigError(
                "the waveforms are not between -1 and 1: ESPnet gives samples of audio in archives as whole numbers\n"
                "  -> make them with --audio_format flac or wav (type sound), not flac.ark or wav.ark (kaldi_ark)"
            )
        if self.prompt_vector.isnan().any():  # no checkpoint was loaded
            self.prompt_vector.copy_(self._prompt_vector())
        self._ready = True

    def reload_pretrained_parameters(self) -> None:
        """Undo ESPnet's ``init``, which calls this, on the mixture: its start is balanced between encoders."""
        self.mixture.load_state_dict(self._initial)


def prompt_vector(prompt: str, llm: str, llm_conf: Mapping[str, Any]) -> Tensor:
    """(P,) float32: what the router reads of ``prompt``, by the LLM of a folder or Hugging Face id.
    Raises ConfigError: no such LLM, or options that it does not have."""
    from pam_espnet.llm.llm import LLM  # transformers: seconds, which decoding does not need

    check_options(llm_conf, "frontend_conf.llm_conf", LLM.from_pretrained, LLM)
    return LLM.from_pretrained(llm, **llm_conf).prompt_vector(prompt)
