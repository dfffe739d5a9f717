"""Audio Spectrogram Transformer (Gong, Chung and Glass, Interspeech 2021): sound events, by folder or Hugging Face id.

Dimension letters: B utterances, N samples, S spectrogram frames, F frequency bins, W windows, P patches over time,
Q patches over frequency, T encoder frames, D width.

The network reads spectrograms of one fixed length (10.24 s as a rule): its positions are learnt, and what is missing is
filled with zeros that are attended to. So every window here has that length, whatever the neighbours. A clip that
fits into one window gives what transformers gives; a longer one, which transformers would cut, is read window by
window, each beginning where the last one's patches end.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pam_espnet.errors import ConfigError
from pam_espnet.frontend.encoders.base import AbsEncoder, load_extractor, load_pretrained

_WINDOW, _HOP = 400, 160  # samples of a spectrogram frame: 25 ms every 10 ms
_RATE = 16000


class ASTEncoder(AbsEncoder):
    """Hidden states of an AST, averaged over frequency: one frame for each step of its patches over time (10 Hz).

    Hidden state 0 is what enters the first block (patches and positions), 1..n are the blocks' outputs, the last one
    behind the final layer norm. The two tokens that sum up a window for the classifier are left out. Frame t is the
    mean over the patches that begin at spectrogram frame ``t * time_stride``; a clip of N samples gives one frame for
    each ``160 * time_stride`` samples begun, also where its last patch would reach beyond its end.
    """

    runs_in_bfloat16 = True

    def __init__(self, path: str, layers: Sequence[int] | None = None) -> None:
        """Load the model; blocks above the highest layer that is emitted are dropped.

        Args:
            path: local folder in Hugging Face's layout, or an id such as ``MIT/ast-finetuned-audioset-10-10-0.4593``;
                with a classifier or without.
            layers: hidden states to emit, 0..n; None for all n + 1.

        Raises:
            ConfigError: missing folder, unreadable model, a layer out of range, or a model whose patches overlap in a
                way that gives no whole grid.
            CheckpointError: weights are missing.
        """
        from transformers import ASTFeatureExtractor, ASTModel

        super().__init__()
        self.model = load_pretrained(ASTModel, path)
        config = self.model.config
        extractor = load_extractor(ASTFeatureExtractor, path)
        if extractor.sampling_rate != _RATE or extractor.num_mel_bins != config.num_mel_bins:
            raise ConfigError(
                f"path: {path} reads {extractor.num_mel_bins} mel bins at {extractor.sampling_rate} Hz; expected are "
                f"{config.num_mel_bins}, as its model has, at {_RATE} Hz"
            )
        self._mean: float = extractor.mean if extractor.do_normalize else 0.0
        self._std: float = extractor.std if extractor.do_normalize else 0.5
        self._bins, self._length, self._step = config.num_mel_bins, config.max_length, config.time_stride
        self._across, self._along = self.model.embeddings.get_shape(config)  # Q, P
        self._samples = _HOP * self._step  # of one encoder frame
        self._blocks = config.num_hidden_layers
        rate = _RATE / self._samples
        self.finish(layers=layers, available=self._blocks + 1, width=config.hidden_size, frame_rate=rate)
        self.model.layers = self.model.layers[: max(self.layers)]

    def output_lengths(self, num_samples: Tensor) -> Tensor:
        """Frames (B,): one for each step of the patches begun."""
        return -(-num_samples // self._samples)

    def hidden_states(self, wave: Tensor, lengths: Tensor) -> Sequence[Tensor]:
        """Hidden states 0..max(layers), each (B,T,D)."""
        host = self.host_lengths
        counts = (-(-self.output_lengths(host) // self._along)).tolist()  # windows of each utterance
        clips = [row[:size] for row, size in zip(wave, host.tolist(), strict=True)]
        windows = torch.cat([self._windows(clip, count) for clip, count in zip(clips, counts, strict=True)])
        hidden = self.model.embeddings(windows.to(self.dtype))
        states = [self._frames(hidden, counts)]
        for block in self.model.layers:
            hidden = block(hidden)
            if len(states) == self._blocks:
                hidden = self.model.layernorm(hidden)
            states.append(self._frames(hidden, counts))
        return states

    def _windows(self, wave: Tensor, count: int) -> Tensor:
        """One utterance (N,) -> its ``count`` spectrograms (W,S,F), as transformers' feature extractor makes one."""
        from torchaudio.compliance.kaldi import fbank

        wave = functional.pad(wave, (0, max(0, _WINDOW - len(wave))))
        mel = fbank(wave[None], sample_frequency=_RATE, window_type="hanning", num_mel_bins=self._bins)
        hop = self._along * self._step  # spectrogram frames from one window to the next
        total = hop * (count - 1) + self._length
        mel = functional.pad(mel, (0, 0, 0, max(0, total - len(mel))))[:total]  # zeros before the normalisation
        mel = (mel - self._mean) / (2 * self._std)
        return mel.unfold(0, self._length, hop).transpose(1, 2)

    def _frames(self, hidden: Tensor, counts: list[int]) -> Tensor:
        """(sum of W, 2 + Q*P, D) -> (B,T,D): patches averaged over frequency, windows put one behind the other."""
        patches = hidden[:, 2:].reshape(len(hidden), self._across, self._along, -1).mean(dim=1)
        rows = [part.flatten(0, 1) for part in patches.split(counts)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
