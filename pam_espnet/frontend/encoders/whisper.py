"""Whisper's encoder (Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision"), any size.

Dimension letters: B utterances, N samples, T encoder frames, D width.

Whisper was trained on windows of exactly 30 s. Here the window is by default as long as the clip plus half a second,
which is several times cheaper for short clips and gives nearly the same features; ``window: 30s`` gives the original.
The clip's own length decides everything: the window it is cut to, the maximum that sets the floor of its log-mel
spectrogram, and which frames its attention includes. So an utterance's hidden states do not depend on its neighbours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pam_espnet.config import check_number
from pam_espnet.errors import ConfigError, PamError
from pam_espnet.frontend.encoders.base import AbsEncoder, load_pretrained, padding_mask
from pam_espnet.transfer import send

_SAMPLE_RATE = 16000
_FFT, _HOP = 400, 160  # samples: 25 ms windows every 10 ms
_FRAME = 2 * _HOP  # samples per encoder frame; the second convolution halves the rate
_DYNAMIC_RANGE = 8.0  # of the log-mel spectrogram, in decades below its maximum


class WhisperEncoder(AbsEncoder):
    """Hidden states of Whisper's encoder at 50 Hz.

    Hidden state 0 is what enters the first block (convolutions and positions), 1..n are the blocks' outputs, the
    last of them after the encoder's final layer norm, as Whisper's own decoder gets it. A clip of N samples gives
    ceil(N / 320) frames: the frames of the padding behind it are encoded, attended to, and cut off.
    """

    runs_in_bfloat16 = True
    _filters: Tensor  # (mels, 201)
    _hann: Tensor

    def __init__(
        self,
        path: str,
        layers: Sequence[int] | None = None,
        window: str = "clip",
        pad_seconds: float = 0.5,
        long_clips: str = "refuse",
    ) -> None:
        """Load the encoder half of a Whisper checkpoint; its decoder is not read.

        Args:
            path: local folder in Hugging Face's layout, or a Hugging Face id such as ``openai/whisper-small``.
            layers: hidden states to emit, 0..n; None for all n + 1.
            window: ``clip`` (the clip and ``pad_seconds``, rounded up to whole frames, at most 30 s) or ``30s``.
            pad_seconds: silence behind the clip in a ``clip`` window, seconds.
            long_clips: what is done with a clip longer than 30 s: ``refuse``, or ``split`` it into equal pieces, each
                encoded in a separate window.

        Raises:
            ConfigError: unknown window or long_clips, negative padding, missing folder, layer out of range.
            CheckpointError: weights are missing.
        """
        from transformers.audio_utils import mel_filter_bank
        from transformers.models.whisper.modeling_whisper import WhisperEncoder as HFWhisperEncoder

        super().__init__()
        if window not in ("clip", "30s"):
            raise ConfigError(f"window: {window!r} for whisper; allowed are 'clip' and '30s'")
        check_number(pad_seconds, "pad_seconds", at_least=0)
        if long_clips not in ("refuse", "split"):
            raise ConfigError(f"long_clips: {long_clips!r} for whisper; allowed are 'refuse' and 'split'")
        self.window, self.long_clips = window, long_clips
        self._pad = round(pad_seconds * _SAMPLE_RATE)
        self.model = load_pretrained(
            HFWhisperEncoder, path, attn_implementation="sdpa", key_mapping={r"^(model\.)?encoder\.": ""}
        )
        config = self.model.config
        self._longest = int(config.max_source_positions) * _FRAME
        bins, top = _FFT // 2 + 1, _SAMPLE_RATE / 2
        filters = mel_filter_bank(bins, config.num_mel_bins, 0.0, top, _SAMPLE_RATE, norm="slaney", mel_scale="slaney")
        self.register_buffer("_filters", torch.from_numpy(filters.T).float(), persistent=False)
        self.register_buffer("_hann", torch.hann_window(_FFT), persistent=False)
        rate = _SAMPLE_RATE / _FRAME
        self.finish(layers=layers, available=config.encoder_layers + 1, width=config.d_model, frame_rate=rate)

    def output_lengths(self, num_samples: Tensor) -> Tensor:
        """Frames (B,) of clips of ``num_samples`` (B,): one for each 20 ms begun."""
        return -(-num_samples // _FRAME)

    def hidden_states(self, wave: Tensor, lengths: Tensor) -> Sequence[Tensor]:
        """Hidden states 0..max(layers), each (B,T,D).
        Raises PamError: a clip is longer than the model's window, and such are refused; it is never cut silently."""
        longest = int(self.host_lengths.max())
        if longest > self._longest:
            if self.long_clips == "split":
                return self._in_pieces(wave, self.host_lengths)
            raise PamError(
                f"a clip of {longest / _SAMPLE_RATE:.2f} s is longer than Whisper's window of "
                f"{self._longest / _SAMPLE_RATE:g} s\n  -> cut it with a segments file, format the data with a "
                "smaller maximum duration, or set long_clips: split"
            )
        return self._encode(wave, lengths, self.host_lengths)

    def _windows(self, lengths: Tensor) -> Tensor:
        if self.window == "30s":
            return torch.full_like(lengths, self._longest)
        return (self.output_lengths(lengths + self._pad) * _FRAME).clamp(max=self._longest)

    def _encode(self, wave: Tensor, lengths: Tensor, host_lengths: Tensor) -> list[Tensor]:
        """Hidden states (B,T,D) of clips that fit the model's window."""
        windows, host_windows = self._windows(lengths), self._windows(host_lengths)
        mel = self._log_mel(wave, windows, int(host_windows.max()))
        # Zeros beyond the own window are what the first convolution's own padding would put there. The second one, of
        # kernel 3 and stride 2, reads nothing beyond a window of whole frames.
        mel = mel.masked_fill(padding_mask(windows // _HOP, mel.shape[2])[:, None], 0.0).to(self.dtype)
        hidden = functional.gelu(self.model.conv1(mel))
        hidden = functional.gelu(self.model.conv2(hidden)).transpose(1, 2)
        hidden = hidden + self.model.embed_positions.weight[: hidden.shape[1]]
        outside = padding_mask(windows // _FRAME, hidden.shape[1])
        mask = None
        if host_windows.min() < host_windows.max():
            lowest = torch.finfo(hidden.dtype).min
            mask = torch.zeros_like(outside, dtype=hidden.dtype).masked_fill(outside, lowest)[:, None, None, :]
            mask = mask.expand(-1, 1, hidden.shape[1], -1)
        states = [hidden]
        for layer in self.model.layers[: max(self.layers)]:
            states.append(layer(states[-1], attention_mask=mask))
        if len(states) == len(self.model.layers) + 1:
            states[-1] = self.model.layer_norm(states[-1])
        return states

    def _in_pieces(self, wave: Tensor, lengths: Tensor) -> list[Tensor]:
        """Hidden states (B,T,D) of clips some of which are cut into equal pieces of whole frames."""
        frames = self.output_lengths(lengths)
        counts = -(-frames // (self._longest // _FRAME))  # (B,) pieces
        sizes = -(-frames // counts) * _FRAME  # (B,) samples of a piece but the last
        pieces: list[Tensor] = []
        for row, length, count, size in zip(wave, lengths.tolist(), counts.tolist(), sizes.tolist(), strict=True):
            pieces += [row[start * size : min((start + 1) * size, length)] for start in range(count)]
        piece_lengths = torch.tensor([len(piece) for piece in pieces])
        padded = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
        states = self._encode(padded, send(piece_lengths, wave.device), piece_lengths)
        kept = self.output_lengths(piece_lengths).tolist()
        joined: list[Tensor] = []
        for state in states:
            parts = iter([piece[:frame] for piece, frame in zip(state, kept, strict=True)])
            rows = [torch.cat([next(parts) for _ in range(count)]) for count in counts.tolist()]
            joined.append(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
        return joined

    def _log_mel(self, wave: Tensor, windows: Tensor, size: int) -> Tensor:
        """Log-mel spectrogram (B,mels,N/160), each row as Whisper's own for a clip of its window (B,) samples, of
        which ``size`` is the largest.

        The short-time transform reflects the signal at both ends of the window, so each row is extended at its own
        end before one transform runs over all of them. Values beyond a row's own window mean nothing.
        """
        wave = functional.pad(wave, (0, size - wave.shape[1])) if size > wave.shape[1] else wave
        index = torch.arange(-(_FFT // 2), size + _FFT // 2, device=wave.device).abs()[None, :]
        last = windows[:, None] - 1
        index = torch.where(index > last, 2 * last - index, index).clamp(min=0)
        signal = wave.gather(1, index)
        spectrum = torch.stft(signal, _FFT, _HOP, window=self._hann, center=False, return_complex=True)
        power = spectrum[..., :-1].abs().square()
        mel = (self._filters @ power).clamp(min=1e-10).log10()
        outside = padding_mask(windows // _HOP, mel.shape[2])[:, None]
        peak = mel.masked_fill(outside, -torch.inf).amax(dim=(1, 2), keepdim=True)
        return (torch.maximum(mel, peak - _DYNAMIC_RANGE) + 4.0) / 4.0
