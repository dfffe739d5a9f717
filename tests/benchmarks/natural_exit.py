"""Early exit as a natural capability: how often a block of an untouched LLM already names the last block's token.

The claim of Shan et al. (arXiv 2412.01455) before any training: each block's hidden states, read through the LLM's own
final norm and output layer, on plain text. Two LLMs of different depth side by side:

    cd egs/mini/pam1
    python ../../../tests/benchmarks/natural_exit.py --llm SmolLM2=downloads/models/smollm2-135m-instruct \\
        --llm Gemma3=downloads/models/gemma3-270m --text fortunes/people

The recipe's README says how the second is fetched; the text is /usr/share/games/fortunes/people of Debian's package
fortunes. An LLM is a folder of any causal LLM that transformers reads.

Prints, for blocks at every sixth of the depth and each of the last three: agreement with the last block (%) at first
pieces of words and at later ones, and the loss of the next token (nats); and the mean depth of an oracle that leaves at
the first block that names the last one's token (first match), or from which on all do (saturated). A paragraph's first
eight tokens are left out: there is little to predict them from.

Dimension letters: L text tokens, H blocks, V vocabulary.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from pam_espnet.early_exit.profile import WORD_STARTS
from pam_espnet.fileio import write_json
from pam_espnet.score.intervals import Ratio, bootstrap
from pam_espnet.score.report import table

CONTEXT = 8  # tokens


def load(source: str) -> tuple[Any, Any]:
    """LLM in float32 and tokenizer from a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llm = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(llm.config.get_text_config(), name, None):
            raise SystemExit(f"{source}: {name}: its logits are more than final norm and output layer")
    return llm, AutoTokenizer.from_pretrained(source)


@torch.no_grad()
def read_text(llm: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each block's best next token (H,L-9), and its loss of the right one, after a text's tokens (L,) 9 to L-1."""
    found = llm.model(ids[None], output_hidden_states=True)
    # transformers' last hidden state has been through the final norm; the others have not
    hidden = [llm.model.norm(one) for one in found.hidden_states[1:-1]] + [found.hidden_states[-1]]
    best, losses = [], []
    for one in hidden:
        logits = llm.lm_head(one[0, CONTEXT:-1])
        best.append(logits.argmax(-1))
        losses.append(F.cross_entropy(logits, ids[1 + CONTEXT :], reduction="none"))
    return torch.stack(best), torch.stack(losses)


def profile(llm: Any, tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """Agreement, loss and oracle depths of an LLM on paragraphs of text, with intervals over these."""
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    same, loss, first, of_text = [], [], [], []
    for text in tqdm(texts, unit="text"):
        ids = torch.tensor(begin + tokenizer(text, add_special_tokens=False).input_ids)
        if len(ids) < CONTEXT + 2:
            continue
        best, losses = read_text(llm, ids)
        same.append(best == best[-1])
        loss.append(losses)
        pieces = tokenizer.convert_ids_to_tokens(best[-1].tolist())
        first.append(torch.tensor([piece.startswith(WORD_STARTS) for piece in pieces]))
        of_text += [len(same) - 1] * (len(ids) - CONTEXT - 1)
    agree, losses, starts = torch.cat(same, 1), torch.cat(loss, 1), torch.cat(first)
    depth = len(agree)
    groups = {"first piece": starts, "later piece": ~starts}
    blocks = [
        {
            "block": h + 1,
            **{name: share(agree[h][rows]) for name, rows in groups.items()},
            "all": share(agree[h]),
            "loss": float(losses[h].mean()),
        }
        for h in range(depth)
    ]
    oracles = {}
    for name, hit in (("first match", agree), ("saturated", agree.flip(0).cummin(0).values.flip(0))):
        leaves = hit.float().argmax(0).add(1).double().numpy()
        oracles[name] = bootstrap(Ratio(np.bincount(of_text, leaves), np.bincount(of_text)))._asdict()
    return {"blocks": blocks, "tokens": int(agree.shape[1]), "depth": depth, "oracle": oracles}


def share(rows: Tensor) -> float | None:
    """Percent."""
    return 100 * float(rows.float().mean()) if len(rows) else None


def show(name: str, found: dict[str, Any]) -> str:
    """Markdown of one LLM."""
    depth = found["depth"]
    chosen = sorted({max(1, round(depth * part / 6)) for part in range(1, 7)} | set(range(depth - 2, depth + 1)))
    rows = []
    for one in (found["blocks"][block - 1] for block in chosen):
        figures = ["–" if one[key] is None else f"{one[key]:.1f}" for key in ("all", "first piece", "later piece")]
        rows.append([f"{one['block']} of {depth}", *figures, f"{one['loss']:.2f}"])
    oracles = ", ".join(
        f"{key} {one['value']:.1f} [{one['low']:.1f}, {one['high']:.1f}]" for key, one in found["oracle"].items()
    )
    head = ("block", "agreement %, all", "first piece", "later piece", "loss")
    return f"## {name}\n\n{table(head, rows)}\n{found['tokens']} tokens; mean depth of an oracle: {oracles}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", action="append", required=True, metavar="NAME=PATH", help="may be repeated")
    parser.add_argument("--text", type=Path, required=True, help="paragraphs between blank lines, or lines of a %%")
    parser.add_argument("--paragraphs", type=int, default=100, help="the first ones of 20 words or more (100)")
    parser.add_argument("--output", type=Path, default=Path("natural_exit.json"), help="where the figures go as JSON")
    args = parser.parse_args()
    found = (" ".join(part.split()) for part in re.split(r"\n(?:%?\n)+", args.text.read_text(encoding="utf-8")))
    texts = [text for text in found if text.count(" ") >= 19][: args.paragraphs]
    results = {}
    for name, _, source in (one.partition("=") for one in args.llm):
        results[name] = profile(*load(source), texts)
        print(show(name, results[name]))
    write_json(args.output, {"text": str(args.text), "paragraphs": len(texts), "llms": results})


if __name__ == "__main__":
    main()
