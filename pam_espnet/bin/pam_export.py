"""Write the LLM of a model, with LoRA merged, as a folder that other programs serve.

    python -m pam_espnet.bin.pam_export --model exp/mine --vllm merged

The folder has Hugging Face's layout, with tokenizer and chat template. Encoders, adapters and fusion are not in it:
they make the input embeddings, which vLLM takes as prompt_embeds (README).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.bin.pam_inference import add_model_names, model_folders
from pam_espnet.cli import run_main


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_names(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as trained)")
    parser.add_argument("--vllm", required=True, type=Path, metavar="DIR", help="what to write; must not exist")
    args = parser.parse_args(argv)
    folders = model_folders(args.models)
    from pam_espnet.llm.export import check_target, export_llm
    from pam_espnet.package import load

    check_target(args.vllm)  # before a model is loaded for nothing
    export_llm(load(args.model, folders, {}, "cpu", args.dtype, args.revision).model.decoder, args.vllm)
    print(f"wrote {args.vllm}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
