"""Folders of tiny random models: the networks that converters write, Whisper, and waveform models of transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def _write(folder: Path, net: Any, config: dict[str, Any], spread: float = 1.0) -> Path:
    """Random weights that keep a signal's size from layer to layer, so that a wrong frame shows at the last one."""
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in net.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            torch.nn.init.normal_(parameter, std=spread * fan_in**-0.5)
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny_yamnet_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """YAMNet with a sixteenth of its channels: 64 wide."""
    from pam_espnet.frontend.encoders.yamnet import CHANNELS, STRIDES, YAMNet

    channels = [wide // 16 for wide in CHANNELS]
    config = {"channels": channels, "strides": list(STRIDES)}
    return _write(tmp_path_factory.mktemp("models") / "yamnet", YAMNet(channels), config, spread=1.4)


@pytest.fixture(scope="session")
def tiny_pyannote_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The segmentation network with 8 filters and two LSTM layers of 6: 12 wide, 6 hidden states."""
    from pam_espnet.frontend.encoders.pyannote import PyanNet

    network = {"num_filters": 8, "channels": 5, "lstm_width": 6, "num_lstm_layers": 2, "linear_width": 9}
    return _write(tmp_path_factory.mktemp("models") / "pyannote", PyanNet(**network), {"network": network})


def _random_transformer(model: Any, folder: Path) -> Path:
    """Save ``model`` with random weights that let every layer matter; the usual deviation of 0.02 leaves little."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "original0" not in name and "embed_positions" not in name:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_whisper_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whisper with 3 blocks of width 16 and a window of 3 s instead of 30."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=50,
        num_mel_bins=20,
        d_model=16,
        encoder_layers=3,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=150,
        max_target_positions=20,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"), 0),
    )
    folder = _random_transformer(WhisperForConditionalGeneration(config), tmp_path_factory.mktemp("models") / "whisper")
    WhisperFeatureExtractor(feature_size=20, chunk_length=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_ast_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AST with 3 blocks of width 16 and windows of 64 spectrogram frames: 5 patches, half a second; with classifier."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    config = ASTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_length=64,
        num_mel_bins=40,
        num_labels=7,
    )
    folder = _random_transformer(ASTForAudioClassification(config), tmp_path_factory.mktemp("models") / "ast")
    ASTFeatureExtractor(num_mel_bins=40, max_length=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_wave_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_wave_dir(kind)``: a waveform model with 2 blocks of width 16; kind is ``<family>-<norm>``."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def make(kind: str) -> Path:
        import transformers
        from transformers import AutoConfig, AutoModel

        if kind not in made:
            family, norm = kind.rsplit("-", 1)
            sizes = {
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "conv_dim": [8, 8, 8],
                "conv_kernel": [10, 8, 8],
                "conv_stride": [5, 8, 8],
                "num_feat_extract_layers": 3,
                "num_conv_pos_embedding_groups": 2,
            }
            positions = {"num_conv_pos_embeddings": 2 if family == "data2vec-audio" else 8, "conv_pos_kernel_size": 5}
            style = {"feat_extract_norm": norm, "do_stable_layer_norm": norm == "layer"}
            config = AutoConfig.for_model(family, **sizes, **positions, **style)
            made[kind] = _random_transformer(AutoModel.from_config(config), root / kind)
            extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=norm == "layer")
            extractor.save_pretrained(made[kind])
        return made[kind]

    return make
