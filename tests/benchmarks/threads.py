"""Time of an LLM's forward and backward pass on a CPU, by how long OpenMP's threads spin while they wait.

    python tests/benchmarks/threads.py --llm egs/mini/pam1/downloads/models/smollm2-135m-instruct [--busy 2]

Every setting runs in a process of its own; rounds of the settings take turns. --busy: processes that do something else
on the same cores.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

COUNTS = (1000, 10000, 100000)
SETTINGS = ("default", "OMP_WAIT_POLICY=PASSIVE", *(f"GOMP_SPINCOUNT={count}" for count in COUNTS))
LOOP = "while True: pass"


def main() -> None:
    """Print a line per setting and round: the median of the passes in seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True, help="folder of a causal LLM")
    parser.add_argument("--passes", type=int, default=9, help="in a round (9)")
    parser.add_argument("--rounds", type=int, default=2, help="of every setting (2)")
    parser.add_argument("--busy", type=int, default=0, help="busy processes beside it (0)")
    parser.add_argument("--one", action="store_true", help="only one round, with the environment as it is")
    args = parser.parse_args()
    if args.one:
        print(f"{passes(args.llm, args.passes):.2f}")
        return
    others = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(args.busy)]
    try:
        for _ in range(args.rounds):
            for setting in SETTINGS:
                own = [] if setting == "default" else [setting.split("=")]
                command = [sys.executable, __file__, "--llm", args.llm, "--passes", str(args.passes), "--one"]
                environment = {**os.environ, **dict(own)}
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                print(f"{setting}, {args.busy} busy: {done.stdout.strip()} s", flush=True)
    finally:
        for other in others:
            other.kill()


def passes(folder: str, count: int) -> float:
    """Median seconds of ``count`` passes of 16 utterances of 70 positions, after one that is not counted."""
    import torch
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    lm.requires_grad_(False)
    torch.manual_seed(0)
    x = (0.1 * torch.randn(16, 70, lm.config.hidden_size)).bfloat16().requires_grad_()
    times = []
    for _ in range(count + 1):
        begun = time.perf_counter()
        lm.model(inputs_embeds=x, use_cache=False).last_hidden_state.float().square().mean().backward()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
