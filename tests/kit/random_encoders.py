"""The encoders of the recipes with random weights, made from configuration objects: real classes, no folders.

B utterances, N samples, D width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from pam_espnet.frontend.encoders import hf_wave, whisper
from pam_espnet.frontend.frontend import PaMFrontend

KINDS = ("whisper", "wavlm", "wav2vec2")
# of Whisper: width, blocks, heads, feed-forward width, mel bins; of the others: width, blocks, heads, feed-forward
# width, channels of the convolutions
LARGE = {"whisper": (1280, 32, 20, 5120, 128), "wave": (1024, 24, 16, 4096, 512)}  # whisper-large-v3, wavlm-large
SMALL = {"whisper": (128, 3, 4, 256, 40), "wave": (128, 3, 4, 256, 32)}


def random_model(kind: str, sizes: dict[str, tuple[int, ...]]) -> Any:
    """A network of transformers on the default device, in float32."""
    import transformers as tf
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    width, blocks, heads, network, last = sizes["whisper" if kind == "whisper" else "wave"]
    if kind == "whisper":
        config: Any = tf.WhisperConfig(
            d_model=width, encoder_layers=blocks, encoder_attention_heads=heads, encoder_ffn_dim=network,
            num_mel_bins=last, max_source_positions=1500,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        return WhisperEncoder(config)
    family = {"wavlm": "WavLM", "wav2vec2": "Wav2Vec2"}[kind]
    config = getattr(tf, f"{family}Config")(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, intermediate_size=network,
        conv_dim=[last] * 7, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=kind == "wav2vec2",
        num_conv_pos_embeddings=128, num_conv_pos_embedding_groups=16,
    )  # fmt: skip
    return getattr(tf, f"{family}Model")(config)


@contextmanager
def random_weights(sizes: dict[str, tuple[int, ...]], device: str) -> Iterator[None]:
    """Inside, encoders take their path for a kind of ``KINDS`` and get a random network of that kind."""

    def load(_: Any, path: str, **options: Any) -> Any:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(KINDS.index(path))
            model = random_model(path, sizes)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.dim() > 1 and "original0" not in name and "embed_positions" not in name:
                        parameter.normal_(std=parameter[0].numel() ** -0.5)  # every block changes something
        return model.eval()

    extractor = SimpleNamespace(do_normalize=True, sampling_rate=16000)
    with (
        mock.patch.object(whisper, "load_pretrained", load),
        mock.patch.object(hf_wave, "load_pretrained", load),
        mock.patch.object(hf_wave, "load_extractor", return_value=extractor),
    ):
        yield


def random_frontend(
    width: int, device: str, sizes: dict[str, tuple[int, ...]], kinds: Sequence[str] = KINDS, fusion: str = "pam"
) -> PaMFrontend:
    """Encoders, adapters and a fusion for an LLM of ``width`` (D) on ``device``; all encoders have weight."""
    layers = sizes["whisper"][1]
    encoders = {
        kind: {
            "type": "whisper" if kind == "whisper" else "hf_wave",
            "path": kind,
            "layers": list(range(1, 1 + min(layers, sizes["whisper" if kind == "whisper" else "wave"][1]))),
        }
        for kind in kinds
    }
    with random_weights(sizes, device), torch.random.fork_rng():
        torch.manual_seed(5)
        return PaMFrontend(encoders, fusion, width=width, prompt_width=width).to(device).eval()
