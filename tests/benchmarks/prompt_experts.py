"""Which experts the prompts of some wordings find in trained PaM models, and how sure their routers are of it.

A router reads the prompt alone, so no recording is encoded and nothing is decoded: seconds for each model. A task's own
expert is the one that its first wording finds. In the recipe's folder:

    python ../../../tests/benchmarks/prompt_experts.py --prompts conf/unseen_wordings --out WORDINGS_scaled.json \\
        --exp exp/scaled_quick_seed1 exp/scaled_quick_seed2 exp/scaled_quick_seed3

Prints a table and writes it: for each wording the probability of its task's own expert and, where another expert is
chosen, whose that is.
"""

import argparse
from pathlib import Path


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp", required=True, nargs="+", help="experiment directories")
    parser.add_argument("--prompts", required=True, type=Path, help="folder of <task>.txt, a wording a line")
    parser.add_argument("--out", required=True, help="JSON of the table, which a README can quote")
    args = parser.parse_args()
    if len({Path(exp).name for exp in args.exp}) < len(args.exp):
        parser.error("--exp: two directories of the same name, which names their columns")

    import torch
    from tqdm import tqdm

    from pam_espnet.data.prompts import read_prompts
    from pam_espnet.decode.options import AnswerOptions
    from pam_espnet.decode.speech_llm import SpeechLLM
    from pam_espnet.fileio import write_json
    from pam_espnet.score.report import table

    torch.set_num_threads(1)
    wordings = {path.stem: read_prompts(path) for path in sorted(args.prompts.glob("*.txt"))}
    if not wordings:
        parser.error(f"--prompts: {args.prompts} has no <task>.txt")
    asked = [(task, prompt) for task, prompts in wordings.items() for prompt in prompts]
    rows = [{"task": task, "wording": prompt} for task, prompt in asked]
    total = {"task": "all", "wording": "other wordings that find their task's own expert"}
    for exp in tqdm(args.exp, unit="model"):
        model = SpeechLLM.load(exp, AnswerOptions(), dtype="float32").model
        with torch.no_grad():
            routing = model.frontend.route(model.prompt_vectors([prompt for _, prompt in asked]))
        chosen, probs = routing.expert.tolist(), routing.expert_probs.tolist()
        own = {task: chosen[asked.index((task, prompts[0]))] for task, prompts in wordings.items()}
        right = 0
        for row, (task, prompt), expert, probabilities in zip(rows, asked, chosen, probs, strict=True):
            row[Path(exp).name] = f"{probabilities[own[task]]:.3f}"
            if expert != own[task]:
                whose = " and ".join(name for name, index in own.items() if index == expert) or f"expert {expert}"
                row[Path(exp).name] += f" **({whose})**"
            elif prompt != wordings[task][0]:
                right += 1
        total[Path(exp).name] = f"{right} of {len(asked) - len(wordings)}"
    rows.append(total)
    write_json(args.out, {"rows": rows})
    print(table(tuple(rows[0]), [list(row.values()) for row in rows]))


if __name__ == "__main__":
    main()
