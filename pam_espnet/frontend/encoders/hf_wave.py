"""Hugging Face models on raw waveforms: wav2vec 2.0, HuBERT, WavLM, data2vec-audio, by folder or id.

Dimension letters: B utterances, N samples, T encoder frames, D width.

These networks differ in what padding does to them. Where every frame depends on its own samples and on frames that an
attention mask can exclude, a batch runs at once. The others (a group norm over time in the feature extractor, as in
the base sizes; stacked positional convolutions, as in data2vec) would let an utterance's neighbours change it: they
run once per distinct length, unpadded. Sort batches by length where that matters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pam_espnet.errors import ConfigError
from pam_espnet.frontend.encoders.base import AbsEncoder, load_extractor, load_pretrained, padding_mask
from pam_espnet.transfer import send

# Families in which an attention mask makes padding harmless, given layer norms in the feature extractor.
_MASKABLE = ("wav2vec2", "hubert", "wavlm")
_VARIANCE_FLOOR = 1e-7  # of the feature extractors in transformers


class HFWaveEncoder(AbsEncoder):
    """Hidden states of a self-supervised waveform model, 50 Hz as a rule.

    Hidden state 0 is what enters the first block, 1..n are the blocks' outputs as transformers gives them (models with
    pre-norm blocks apply their final norm to the last one). A clip shorter than the feature extractor's receptive
    field (25 ms) is extended with silence to give one frame.
    """

    runs_in_bfloat16 = True

    def __init__(self, path: str, layers: Sequence[int] | None = None) -> None:
        """Load the model; blocks above the highest layer that is emitted are dropped.

        Args:
            path: local folder in Hugging Face's layout, or an id such as ``microsoft/wavlm-base-plus``.
            layers: hidden states to emit, 0..n; None for all n + 1.

        Raises:
            ConfigError: missing folder, unreadable or unsuitable model, layer out of range.
            CheckpointError: weights are missing.
        """
        from transformers import AutoFeatureExtractor, AutoModel

        super().__init__()
        self.model = load_pretrained(AutoModel, path)
        config = self.model.config
        if not hasattr(self.model, "_get_feat_extract_output_lengths") or not hasattr(config, "conv_stride"):
            raise ConfigError(f"path: {path} holds {type(self.model).__name__}, which is no model on raw waveforms")
        if getattr(config, "add_adapter", False):
            # Convolutions for fine-tuning that lower the frame rate of the last hidden state alone.
            config.add_adapter, self.model.adapter = False, None
        extractor = load_extractor(AutoFeatureExtractor, path)
        self._normalize = bool(extractor.do_normalize)
        self._maskable = (
            config.model_type in _MASKABLE
            and config.feat_extract_norm == "layer"
            and not getattr(config, "conv_pos_batch_norm", False)
        )
        self._shortest, stride = 1, 1
        for kernel, step in zip(config.conv_kernel, config.conv_stride, strict=True):
            self._shortest += (kernel - 1) * stride
            stride *= step
        self.finish(
            layers=layers,
            available=config.num_hidden_layers + 1,
            width=config.hidden_size,
            frame_rate=extractor.sampling_rate / stride,
            sample_rate=extractor.sampling_rate,
        )
        # One block more than needed, since a final norm may be applied to the last one's output.
        self.model.encoder.layers = self.model.encoder.layers[: max(self.layers) + 1]
        if config.model_type == "wavlm":
            from pam_espnet.frontend.encoders.wavlm_attention import fuse_attention

            fuse_attention(self.model)

    def output_lengths(self, num_samples: Tensor) -> Tensor:
        """Frames (B,) by the strides of the model's own convolutions, at least one."""
        return self.model._get_feat_extract_output_lengths(num_samples.clamp(min=self._shortest)).long()

    def hidden_states(self, wave: Tensor, lengths: Tensor) -> Sequence[Tensor]:
        """Hidden states 0..max(layers), and perhaps one more, each (B,T,D)."""
        if self._normalize:
            wave = _normalized(wave, lengths)
        lengths = lengths.clamp(min=self._shortest)
        host = self.host_lengths.clamp(min=self._shortest)
        size = int(host.max())
        wave = torch.nn.functional.pad(wave, (0, max(0, size - wave.shape[1]))).to(self.dtype)
        if self._maskable:
            # Without padding a mask changes nothing, and transformers would ask the device whether it is needed.
            mask = None if host.min() == size else (~padding_mask(lengths, size)).long()
            return self.model(wave, attention_mask=mask, output_hidden_states=True).hidden_states
        num_frames = int(self.output_lengths(host).max())
        states: list[Tensor] = []
        for length in host.unique().tolist():
            rows = send((host == length).nonzero()[:, 0], wave.device)
            group = self.model(wave[rows, :length], output_hidden_states=True).hidden_states
            if not states:
                states = [state.new_zeros(len(wave), num_frames, state.shape[2]) for state in group]
            for state, own in zip(states, group, strict=True):
                state[rows, : own.shape[1]] = own
        return states


def _normalized(wave: Tensor, lengths: Tensor) -> Tensor:
    """Zero mean and unit variance over each utterance's own samples (B,N), zeros beyond them."""
    outside = padding_mask(lengths, wave.shape[1])
    count = lengths[:, None]
    centred = (wave - wave.sum(1, keepdim=True) / count).masked_fill(outside, 0.0)
    variance = centred.square().sum(1, keepdim=True) / count
    return centred / (variance + _VARIANCE_FLOOR).sqrt()
