"""PaMFrontend: waveform (or cached hidden states) and prompt vector in, audio embeddings of the LLM's width out.

Dimension letters: B utterances, N samples, T encoder frames, U adapter frames, M encoders, H layers, D width, P
prompt-vector width.

route(prompt) -> run the encoders that have weight -> layer normalisation and mix over each encoder's layers ->
adapter per encoder -> fusion. An utterance's embeddings depend on its own audio and prompt alone, their number on
its sample count alone. The frontend does not use the LLM: the prompt vector is an input.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain
from typing import Any

import torch
from espnet2.asr.frontend.abs_frontend import AbsFrontend
from torch import Tensor, nn

from pam_espnet.config import check_number, check_options
from pam_espnet.errors import ConfigError
from pam_espnet.frontend.adapter import FrameStackingAdapter, mix_layers
from pam_espnet.frontend.encoder_spec import EncoderSpec
from pam_espnet.frontend.encoders.base import AbsEncoder, layer_dtype, padding_mask
from pam_espnet.frontend.encoders.registry import build_encoder, encoder_class
from pam_espnet.frontend.fusion.registry import build_fusion
from pam_espnet.frontend.fusion.routing import Routing, join_routing, keep_encoder, skip_encoders
from pam_espnet.frontend.masking import MaskOptions, draw_spans, hide
from pam_espnet.transfer import send

Hidden = tuple[Tensor, Tensor]  # hidden states (B,H,T,D) and frames (B,)


@dataclass
class AudioEmbeddings:
    """The audio in the LLM's input, and how it was mixed."""

    embeddings: Tensor  # (B,U,D), zero beyond each utterance's length
    lengths: Tensor  # (B,) frames; on the host
    routing: Routing


def join_audio(parts: Sequence[AudioEmbeddings]) -> AudioEmbeddings:
    """One batch of several, padded to the longest."""
    longest = max(part.embeddings.shape[1] for part in parts)  # U
    padded = [nn.functional.pad(part.embeddings, (0, 0, 0, longest - part.embeddings.shape[1])) for part in parts]
    lengths = torch.cat([part.lengths for part in parts])
    return AudioEmbeddings(torch.cat(padded), lengths, join_routing([part.routing for part in parts]))


class PaMFrontend(AbsFrontend):
    """Frozen encoders, trainable adapters and fusion.

    The encoders are kept outside PyTorch's module tree: they are in no checkpoint, no optimizer and no train(), but
    move with the frontend from device to device. They compute outside autocast, in the precision ``encoder_dtype``,
    so that features computed on the fly equal cached ones; all that comes behind them begins in float32.

    Args:
        encoders: name -> options of ``build_encoder`` (``type``, ``path``, ``layers``, ...), in a fixed order.
        fusion: see ``fusion.registry``.
        width: D of the LLM.
        prompt_width: P.
        fusion_conf: options of the fusion.
        adapter_conf: options of every FrameStackingAdapter.
        frame_rate: of the audio embeddings, Hz.
        sample_rate: of the waveforms, Hz.
        skip_threshold: at inference an encoder with less weight than this for a prompt is not run for it, and the
            others share its weight; 0 runs all. In training all encoders take part, or one that once fell below
            the threshold could never come back. Fusions that combine all encoders by definition skip none.
        mask_conf: options of ``masking.MaskOptions``: masks on hidden states in training.
        initial_rms: root mean square of the audio embeddings before training, a learnable gain behind the fusion.
            LLMs' token embeddings are small (0.1 is typical), and audio must not be ten times larger than text.
            Adapters and fusion work at unit scale: the fusion's networks take steps of the same size as others, too
            large for streams of a tenth.
        encoder_dtype: precision of the encoders' layers: float32, bfloat16, or auto (``encoders.base.layer_dtype``).
        specs: name -> EncoderSpec (or its dict). Encoders with a spec are loaded only when a waveform has to be
            encoded; the others are loaded at once.

    Raises ConfigError: encoders, options or rates that cannot work.
    """

    def __init__(
        self,
        encoders: Mapping[str, Mapping[str, Any]],
        fusion: str,
        width: int,
        prompt_width: int,
        fusion_conf: Mapping[str, Any] | None = None,
        adapter_conf: Mapping[str, Any] | None = None,
        frame_rate: float = 12.5,
        sample_rate: int = 16000,
        skip_threshold: float = 0.0,
        mask_conf: Mapping[str, Any] | None = None,
        initial_rms: float = 0.1,
        encoder_dtype: str = "auto",
        specs: Mapping[str, EncoderSpec | Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        fusion_conf, adapter_conf, specs = fusion_conf or {}, adapter_conf or {}, specs or {}
        _check(encoders, adapter_conf, mask_conf or {}, specs, encoder_dtype)
        check_number(frame_rate, "frontend_conf.frame_rate", above=0)
        check_number(initial_rms, "frontend_conf.initial_rms", above=0)
        check_number(skip_threshold, "frontend_conf.skip_threshold", at_least=0, below=1)
        self.names = tuple(encoders)
        self.width, self.frame_rate, self.sample_rate = width, frame_rate, sample_rate
        self.skip_threshold, self.encoder_dtype = skip_threshold, encoder_dtype
        self.masks = MaskOptions(**(mask_conf or {}))
        self._encoder_conf = {name: dict(options) for name, options in encoders.items()}
        self._encoders: dict[str, AbsEncoder] = {}  # a plain dict: nn.Module does not look into it
        self.specs: dict[str, EncoderSpec] = {}
        for name in self.names:
            known = specs.get(name)
            if isinstance(known, Mapping):
                known = EncoderSpec.from_dict(name, known)
            self.specs[name] = known or EncoderSpec.of(name, self.encoder(name))
            if self.specs[name].sample_rate != sample_rate:
                raise ConfigError(
                    f"sample_rate: {sample_rate} Hz, but encoder {name!r} is made for "
                    f"{self.specs[name].sample_rate} Hz: format the data at that rate"
                )
        counts = [self.specs[name].num_layers for name in self.names]
        self.fusion = build_fusion(
            fusion, num_layers=counts, width=width, prompt_width=prompt_width, names=self.names, **fusion_conf
        )
        self.adapters = nn.ModuleDict()
        for name in self.fusion.used:
            spec = self.specs[name]
            self.adapters[name] = FrameStackingAdapter(
                spec.width, width, spec.frame_rate, frame_rate, name, **adapter_conf
            )
        self.gain = nn.Parameter(torch.tensor(float(initial_rms)))

    def encoder(self, name: str) -> AbsEncoder:
        """An encoder, loaded on the first call. Raises ConfigError: it cannot be built, or differs from its spec."""
        if name not in self._encoders:
            try:
                encoder = build_encoder(**self._encoder_conf[name])
            except ConfigError as error:
                raise ConfigError(f"encoders.{name}: {error}") from error
            found = EncoderSpec.of(name, encoder)
            if self.specs.get(name, found) != found:
                raise ConfigError(
                    f"specs.{name}: {self.specs[name]}, but the encoder is {found}: "
                    "drop the spec and compute the features again"
                )
            device = next(chain(self.parameters(), encoder.parameters()), torch.empty(0)).device
            self._encoders[name] = encoder.use_dtype(layer_dtype(self.encoder_dtype, type(encoder), device)).to(device)
        return self._encoders[name]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PaMFrontend:
        super()._apply(fn, recurse)
        device = next(self.parameters()).device
        for name, encoder in list(self._encoders.items()):  # they follow to the device; the precision is an option
            dtype = layer_dtype(self.encoder_dtype, type(encoder), device)
            if (encoder.dtype, dtype) == (torch.bfloat16, torch.float32):
                del self._encoders[name]  # its weights are rounded: read again when it is needed
            else:
                encoder.use_dtype(dtype).to(device)
        return self

    def encode(self, wave: Tensor, lengths: Tensor, names: Sequence[str] | None = None) -> dict[str, Hidden]:
        """Hidden states of waveforms (B,N) in [-1, 1] of ``lengths`` (B,) samples, by the encoders ``names`` or all."""
        return {name: self.encoder(name)(wave, lengths) for name in (self.names if names is None else names)}

    def route(self, prompt_vector: Tensor) -> Routing:
        """Routing for prompt vectors (B,P), with the encoders below the threshold dropped (at inference)."""
        # float32: in half precision near ties between experts could fall differently in training and decoding
        with torch.autocast(prompt_vector.device.type, enabled=False):
            routing = self.fusion.route(prompt_vector.float())
            if self.fusion.learns_encoder_weights and self.skip_threshold > 0 and not self.training:
                routing = skip_encoders(routing, self.skip_threshold)
        return routing

    def needed_encoders(self, routing: Routing) -> list[str]:
        """The encoders that have weight for at least one utterance of the batch; in training all that the fusion uses,
        none of which is skipped."""
        if self.training:
            return [name for name in self.names if name in self.fusion.used]
        needed = (routing.encoder_weights != 0).any(dim=0).tolist()  # NaN as well, for the loss to show it
        return [name for name, need in zip(self.names, needed, strict=True) if need]

    def output_size(self) -> int:
        """D of the audio embeddings."""
        return self.width

    def output_lengths(self, num_samples: Tensor) -> Tensor:
        """Audio embeddings (B,) for sample counts (B,): the exact ``ceil(num_samples / sample_rate * frame_rate)``."""
        return output_lengths(num_samples, self.frame_rate, self.sample_rate)

    def forward(
        self,
        num_samples: Tensor,
        prompt_vector: Tensor,
        wave: Tensor | None = None,
        features: Mapping[str, Hidden] | None = None,
        only: Sequence[str] | None = None,
    ) -> AudioEmbeddings:
        """Audio embeddings for a batch.

        Args:
            num_samples: (B,); on the host, or it waits for the device here.
            prompt_vector: (B,P).
            wave: (B,N) in [-1, 1]; needed for the encoders that ``features`` does not cover.
            features: name -> (hidden states (B,T,H*D) layer by layer as the cache stores them, or (B,H,T,D);
                frames (B,)).
            only: (B) the encoder that gets all weight, one that the fusion uses; the warm start fits each separately.

        Raises ConfigError: an encoder has weight but neither features nor a waveform, or features of another shape.
        """
        routing, num_samples = self.route(prompt_vector), num_samples.cpu()
        needed = self.needed_encoders(routing)
        if only is not None:
            routing, needed = keep_encoder(routing, [self.names.index(one) for one in only]), sorted(set(only))
        hidden = {name: self._unflatten(name, *pair) for name, pair in (features or {}).items() if name in needed}
        missing = [name for name in needed if name not in hidden]
        if missing and wave is None:
            raise ConfigError(
                f"no cached features and no waveform for encoder(s) {', '.join(missing)}: run the feature cache for "
                "them or give the waveforms"
            )
        if missing and wave is not None:
            hidden.update(self.encode(wave, num_samples, missing))
        lengths = self.output_lengths(num_samples)  # (B,)
        num_frames = int(lengths.max())  # U
        samples, frames = send(torch.stack([num_samples, lengths]), prompt_vector.device)
        longest = float(num_samples.max() / self.sample_rate)
        spans = draw_spans(samples / self.sample_rate, longest, self.masks) if self.training else None
        streams: list[Tensor | None] = []
        for name, weights in zip(self.names, routing.layer_weights, strict=True):
            if name not in hidden:
                streams.append(None)
                continue
            # Of the utterances of a batch those that need it: all, but where each is encoded by one encoder.
            rows = slice(None) if only is None else _rows(only, name, samples.device)
            states, valid = (part.to(samples.device)[rows] for part in hidden[name])
            mixed = mix_layers(states, valid, weights[rows], self.specs[name].layer_widths)  # (B,T,D)
            if spans is not None:
                mixed = hide(mixed, self.specs[name].frame_rate, spans[rows], self.masks.dropout)
            stream = self.adapters[name](mixed, num_frames)  # (B,U,D)
            if only is not None:
                stream = stream.new_zeros(len(only), *stream.shape[1:]).index_copy(0, rows, stream)
            streams.append(stream)
        fused = self.gain * self.fusion(streams, routing)
        return AudioEmbeddings(fused.masked_fill(padding_mask(frames, num_frames)[..., None], 0.0), lengths, routing)

    def _unflatten(self, name: str, states: Tensor, frames: Tensor) -> Hidden:
        spec = self.specs[name]
        if states.dim() == 3 and states.shape[2] == spec.num_layers * spec.width:
            states = states.unflatten(2, (spec.num_layers, spec.width)).transpose(1, 2)
        if states.dim() != 4 or (states.shape[1], states.shape[3]) != (spec.num_layers, spec.width):
            raise ConfigError(
                f"cached features of encoder {name!r} have shape {tuple(states.shape)}, but the configuration has "
                f"{spec.num_layers} layers of width {spec.width}: was the cache made with other layers? Rebuild it"
            )
        return states, frames


def _rows(only: Sequence[str], name: str, device: torch.device) -> Tensor:
    return send(torch.tensor([b for b, one in enumerate(only) if one == name]), device)


def output_lengths(num_samples: Tensor, frame_rate: float, sample_rate: int) -> Tensor:
    """Audio embeddings (B,) at ``frame_rate`` Hz of clips of ``num_samples`` (B,) at ``sample_rate`` Hz."""
    per_sample = Fraction(frame_rate).limit_denominator(10**6) / sample_rate
    return -(-num_samples.long() * per_sample.numerator // per_sample.denominator)


def _check(
    encoders: Mapping[str, Mapping[str, Any]],
    adapter_conf: Mapping[str, Any],
    mask_conf: Mapping[str, Any],
    specs: Mapping[str, Any],
    encoder_dtype: str,
) -> None:
    """Refuse names and options that cannot work, before anything is loaded."""
    if not encoders:
        raise ConfigError("encoders: none given")
    for name, options in encoders.items():
        # names are keys of checkpoints and parts of paths
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or hasattr(nn.ModuleDict, name):
            raise ConfigError(f"encoders: {name!r} cannot be a name; use letters, digits, '-' and '_'")
        if not isinstance(options, Mapping) or not isinstance(options.get("type"), str):
            raise ConfigError(f"encoders.{name}: must be a mapping with a key 'type', a name or an import path")
        try:
            kind = encoder_class(options["type"])
        except ConfigError as error:
            raise ConfigError(f"encoders.{name}: {error}") from error
        layer_dtype(encoder_dtype, kind, "cpu")
    if unknown := sorted(set(specs) - set(encoders)):
        raise ConfigError(f"specs: {', '.join(unknown)} not among the encoders {', '.join(encoders)}")
    check_options(adapter_conf, "frontend_conf.adapter_conf", partial(FrameStackingAdapter, 1, 1, 1.0, 1.0, "any"))
    check_options(mask_conf, "frontend_conf.mask_conf", MaskOptions)
