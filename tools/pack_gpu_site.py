#!/usr/bin/env python3
"""Python packages for a GPU machine without internet whose image has PyTorch, as one archive of about 20 MB.

    python tools/pack_gpu_site.py                    # gpu_site.tar.gz at the root of the repository
    python tools/pack_gpu_site.py --output FILE      # another file

Copy it there with the repository; tests/gpu/run.sh unpacks it for its own run. By hand: unpack it, put the folder site/
on PYTHONPATH. The image is expected to have the same minor version of Python, and torch, torchaudio, triton, numpy,
scipy, numba, tokenizers, sentencepiece, safetensors, huggingface_hub, accelerate, PyYAML, tqdm, regex and setuptools;
these are not packed. transformers and peft are, since an image's versions are mostly too old.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import tarfile
from importlib.metadata import Distribution, distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    "cffi", "espnet", "humanfriendly", "iniconfig", "kaldiio", "librosa", "more-itertools", "omniio", "peft", "pluggy",
    "pytest", "rapidfuzz", "soundfile", "soxr", "torch-complex", "transformers", "typeguard",
)  # fmt: skip
LEFT_OUT = re.compile(r"(^|/)(tests?|__pycache__|egs3)(/|$)|\.(pyc|c|cpp|h|pyx)$")
# ESPnet imports distutils. Python 3.12 has it through a .pth file of setuptools, which a folder on PYTHONPATH does not
# run: this is the same by import.
DISTUTILS = """import importlib, sys
import setuptools._distutils as real
sys.modules[__name__] = real
for part in ("errors", "util", "version"):
    sys.modules[f"{__name__}.{part}"] = importlib.import_module(f"setuptools._distutils.{part}")
"""


def main() -> int:
    """Pack; 1 and one line that says why if that cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="environment to take them from (.venv)")
    parser.add_argument("--output", type=Path, default=ROOT / "gpu_site.tar.gz", help="archive (gpu_site.tar.gz)")
    args = parser.parse_args()
    sites = sorted(args.venv.glob("lib/python3.*/site-packages"))
    if not sites:
        print(f"error: {args.venv} is no environment; make it: tools/setup.sh", file=sys.stderr)
        return 1
    found = {_name(one): one for one in distributions(path=[str(sites[0])])}
    if missing := [name for name in NAMES if name not in found]:
        print(f"error: {args.venv} lacks {', '.join(missing)}; install them: tools/setup.sh --force", file=sys.stderr)
        return 1
    pack(sites[0], [found[name] for name in NAMES], args.output)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, for {sites[0].parent.name}")
    return 0


def pack(site: Path, packages: list[Distribution], output: Path) -> None:
    """Files of ``packages``, but neither their tests nor sources to compile, into ``output`` below ``site/``."""
    about = {"python": site.parent.name.removeprefix("python"), "packages": {_name(p): p.version for p in packages}}
    output.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(output, "w:gz") as archive:
        for package in packages:
            for name in map(str, package.files or []):
                if not name.startswith("..") and not LEFT_OUT.search(name) and (site / name).is_file():
                    archive.add(site / name, f"site/{name}")
        for name, text in (("distutils/__init__.py", DISTUTILS), ("packed.json", json.dumps(about, indent=1))):
            info = tarfile.TarInfo(f"site/{name}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))


def _name(package: Distribution) -> str:
    return re.sub(r"[-_.]+", "-", package.metadata["Name"].lower())


if __name__ == "__main__":
    sys.exit(main())
