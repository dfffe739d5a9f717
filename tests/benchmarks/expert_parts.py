"""What in the experts of a trained PaM model does the work: copies of it with a part changed, to decode and score.

    same_weights   every expert mixes encoders and layers by the experts' mean weights; its network stays its own
    no_networks    no expert has a network: its mixture is all that it does
    neither        both changes: every prompt gets the same mixture
    next_expert    every prompt gets the expert after its own

Nothing is trained anew, so what changes is what the LLM has come to rely on; what can be had without a part is shown by
rows of run_evidence.sh that are trained without it (static, one). In the recipe's folder, for each seed:

    E=exp/parts1 R=dump/quick/raw
    python ../../../tests/benchmarks/expert_parts.py --exp exp/pam_quick_seed1 --out $E
    for exp in $E/*; do D=$exp/decode_beam name=$(basename $exp)
        python -m pam_espnet.bin.pam_decode --exp $exp --data $R/test_asr $R/test_count $R/test_caption \\
            --out $D/test_asr $D/test_count $D/test_caption --config conf/decode.yaml --threads 1
        python -m pam_espnet.bin.pam_score --exp $exp --data $R/test_asr $R/test_count $R/test_caption
        python -m pam_espnet.bin.pam_evidence --exp $exp --train $R/train --times /dev/null --name $name --size quick \\
            --settings "after training: $name"
    done
    ./run_evidence.sh --seeds ""
"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LAYERS = "frontend.fusion.layer_logits"  # (E, layers of all encoders)
EXPERTS = "frontend.fusion.experts."  # of each tensor the first dimension is the expert


def same_weights(tensors: dict[str, "Tensor"]) -> None:
    """Logits of the mean weights for all experts."""
    logits = tensors[LAYERS]
    tensors[LAYERS] = logits.softmax(dim=1).mean(dim=0).log().expand_as(logits).contiguous()


def no_networks(tensors: dict[str, "Tensor"]) -> None:
    """Output layers of zero: an expert returns its input."""
    for name in ("out_weight", "out_bias"):
        tensors[EXPERTS + name].zero_()


def neither(tensors: dict[str, "Tensor"]) -> None:
    """The two changes above."""
    same_weights(tensors)
    no_networks(tensors)


def next_expert(tensors: dict[str, "Tensor"]) -> None:
    """Expert e gets the weights and the network of expert e + 1, the last one those of the first."""
    for name, tensor in tensors.items():
        if name == LAYERS or name.startswith(EXPERTS):
            tensors[name] = tensor.roll(-1, dims=0)


CHANGES: dict[str, Callable[[dict[str, "Tensor"]], None]] = {
    change.__name__: change for change in (same_weights, no_networks, neither, next_expert)
}


def main() -> None:
    """Write the copies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp", type=Path, required=True, help="experiment directory of a PaM model")
    parser.add_argument("--out", type=Path, required=True, help="a folder for a copy for each change")
    args = parser.parse_args()

    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    source = args.exp / "model.safetensors"
    for name, change in CHANGES.items():
        try:
            tensors = load_file(source)
        except (OSError, SafetensorError) as error:
            parser.error(f"--exp: {source}: {error}")
        if missing := {LAYERS, f"{EXPERTS}out_weight"} - tensors.keys():
            parser.error(f"--exp: {source} has no {min(missing)}: not a PaM model whose experts have networks")
        change(tensors)
        folder = args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(args.exp / "config.yaml", folder / "config.yaml")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        print(f"{folder}: decode it with the commands of --help")


if __name__ == "__main__":
    main()
