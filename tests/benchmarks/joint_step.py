"""Cost of joint optimisation for early exit per training step: ratios to plain steps in the same run.

    plain     the answer's loss from the last block
    joint     and from one drawn block, through the shared output layer (model_conf.exit_weight)

A step is the LLM's forward and backward pass with LoRA on all projections, on random audio embeddings and running text;
encoders and adapters, which cost the same in both, are not part of it. Rounds of the two alternate, so that a
machine that slows down slows them all; medians are reported.

    python tests/benchmarks/joint_step.py --llm egs/mini/pam1/downloads/models/smollm2-135m-instruct
"""

import argparse
import json
import statistics
import time
from pathlib import Path

ANSWER = "the old man told his son to wait by the river until the last boat had come home in the evening "
PROMPT = "Transcribe the speech into text."


def main() -> None:
    """Print the ratios and, with --output, write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True, help="folder of a causal LLM")
    parser.add_argument("--batch", type=int, default=8, help="utterances (8)")
    parser.add_argument("--audio", type=int, default=40, help="audio embeddings per utterance (40)")
    parser.add_argument("--answer", type=int, default=20, help="tokens per answer (20)")
    parser.add_argument("--layers", type=int, nargs="+", help="exit_layers (the upper half, every fourth block)")
    parser.add_argument("--rounds", type=int, default=8, help="timings of each (8)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--dtype", default="float32", help="precision of the LLM (float32)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()

    import torch

    from pam_espnet.llm.llm import LLM
    from pam_espnet.llm.prompt_layout import build_inputs, lay_out, layout

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    lora = {"r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"}
    decoder = LLM.from_pretrained(
        args.llm, lora=lora, dtype=args.dtype, gradient_checkpointing=args.checkpointing
    ).train()
    blocks = decoder.num_layers
    layers = args.layers or list(range(blocks // 2, blocks, 4))
    parts = layout(decoder.tokenizer, PROMPT, decoder.system)
    ids = decoder.tokenizer(ANSWER * 5)["input_ids"]
    audio = 0.1 * torch.randn(args.batch, args.audio, decoder.width)
    answers = [ids[start : start + args.answer] for start in range(args.batch)]
    inputs = build_inputs(lay_out([parts] * args.batch, [args.audio] * args.batch, answers), audio, decoder.embed)

    def step(way: str, draw: int) -> None:
        exit_block = None if way == "plain" else layers[draw % len(layers)]
        losses = decoder.token_losses(inputs, exit_block)
        loss = losses.nll.mean()
        if losses.exit_nll is not None:
            loss = loss + 0.3 * losses.exit_nll.mean()
        loss.backward()
        decoder.zero_grad(set_to_none=True)

    ways = ("plain", "joint")
    wall: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    for draw in range(-1, args.rounds):
        for way in ways:
            begun = time.perf_counter(), time.process_time()
            step(way, draw)
            if draw >= 0:  # the first round warms up
                wall[way].append(time.perf_counter() - begun[0])
                cpu[way].append(time.process_time() - begun[1])
    rows = []
    for way in ways:
        row = {
            "way": way,
            "seconds": statistics.median(wall[way]),
            "cpu_seconds": statistics.median(cpu[way]),
            "cost": statistics.median(wall[way]) / statistics.median(wall["plain"]),
            "cpu_cost": statistics.median(cpu[way]) / statistics.median(cpu["plain"]),
        }
        rows.append(row)
        print(f"{way:8s} {row['seconds']:.2f} s per step, {row['cost']:.2f}x of plain (CPU {row['cpu_cost']:.2f}x)")
    print(f"exit layers {layers}")
    if args.output:
        record = {
            "options": {key: str(value) for key, value in vars(args).items()},
            "layers": layers,
            "torch": torch.__version__,
            "rows": rows,
        }
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
