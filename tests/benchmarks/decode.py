"""How fast the beam search decodes, as ratios to transformers' ``generate`` on the same prefixes in the same run.

Three ways to the same n-best (their tokens are compared before anything is timed):

    generate      transformers' beam search, the prefix copied for every hypothesis
    transformers  this project's search over transformers' cache (llm_conf.fused_decoding: false)
    fused         this project's search over fused blocks and a tree of hypotheses (the default)

Every way decodes the same number of tokens (end tokens are switched off). Prefixes are embeddings of running text.
Rounds of the ways alternate, so that a machine that slows down slows them all; medians are reported. Prefill is the
time of a search of one token; a step is the rest, divided by its steps.

    python tests/benchmarks/decode.py --llm egs/mini/pam1/downloads/models/smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXT = (
    "A speech model hears a recording, reads the question that is put to it, and answers in words. It may be asked who "
    "is talking, what is said, or which sounds are to be heard in the background, and it should say so in plain words. "
)


def main() -> None:
    """Print a table and, with --output, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True, help="folder of a Llama-type causal LLM")
    parser.add_argument("--prefix", type=int, nargs="+", default=[50, 100, 400], help="positions (50 100 400)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="utterances (1 8)")
    parser.add_argument("--beam", type=int, default=4, help="hypotheses per utterance (4)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens to decode (24)")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each way (3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--dtype", default="float32", help="precision of the LLM (float32)")
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()

    import torch
    import transformers

    from pam_espnet.decoder.llm import LLMDecoder
    from pam_espnet.search.beam import beam_search
    from pam_espnet.search.options import BeamOptions

    torch.set_num_threads(args.threads)
    attention = "sdpa"
    decoders = {
        name: LLMDecoder.from_pretrained(args.llm, dtype=args.dtype, attention=attention, fused_decoding=fused)
        .to(args.device)
        .eval()
        for name, fused in (("transformers", False), ("fused", True))
    }
    lm, tokenizer = decoders["transformers"].lm, decoders["transformers"].tokenizer
    ids = tokenizer(TEXT * 40)["input_ids"]

    def options(tokens: int) -> BeamOptions:
        return BeamOptions(beam_size=args.beam, nbest=args.beam, max_new_tokens=tokens, eos_ids=())

    def own(name: str) -> Callable[[Any, int], list[list[int]]]:
        def run(prefix: Any, tokens: int) -> list[list[int]]:
            lengths = torch.full((len(prefix),), prefix.shape[1], device=prefix.device)
            return [
                one.tokens for nbest in beam_search(decoders[name], prefix, lengths, options(tokens)) for one in nbest
            ]

        return run

    def generate(prefix: Any, tokens: int) -> list[list[int]]:
        return lm.generate(
            inputs_embeds=prefix,
            attention_mask=torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device),
            do_sample=False,
            num_beams=args.beam,
            num_return_sequences=args.beam,
            max_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=0,
        ).tolist()

    ways = {"generate": generate, "transformers": own("transformers"), "fused": own("fused")}
    rows = []
    for length in args.prefix:
        for batch in args.batch:
            starts = [17 * b for b in range(batch)]
            tokens = torch.tensor([ids[start : start + length] for start in starts], device=args.device)
            prefix = lm.get_input_embeddings()(tokens).detach()
            found = {name: way(prefix, args.tokens) for name, way in ways.items()}
            same = {name: sum(a == b for a, b in zip(found["generate"], found[name], strict=True)) for name in ways}
            times: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "total": [], "cpu": []} for name in ways}
            for _ in range(args.rounds):
                for name, way in ways.items():
                    times[name]["prefill"].append(timed(way, prefix, 1, args.device)[0])
                    total, cpu = timed(way, prefix, args.tokens, args.device)
                    times[name]["total"].append(total)
                    times[name]["cpu"].append(cpu)
            for name in ways:
                median = {key: statistics.median(values) for key, values in times[name].items()}
                median["step"] = (median["total"] - median["prefill"]) / (args.tokens - 1)
                rows.append({"way": name, "prefix": length, "batch": batch, "same_nbest": same[name], **median})
                base = rows[-1 - list(ways).index(name)]
                faster = {key: base[key] / median[key] for key in ("total", "prefill", "step", "cpu")}
                rows[-1]["faster"] = faster
                print(
                    f"prefix {length:4d}  batch {batch:3d}  {name:12s} total {median['total']:7.3f} s"
                    f"  prefill {median['prefill']:6.3f} s  step {1000 * median['step']:7.1f} ms"
                    f"  faster: total {faster['total']:.2f}x prefill {faster['prefill']:.2f}x"
                    f" step {faster['step']:.2f}x"
                    f"  same n-best {same[name]}/{batch * args.beam}",
                    flush=True,
                )
    if args.output:
        record = {
            "options": {key: str(value) for key, value in vars(args).items()},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "rows": rows,
        }
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def timed(way: Callable[[Any, int], Any], prefix: Any, tokens: int, device: str) -> tuple[float, float]:
    """Wall and CPU seconds of one search."""
    import torch

    wall, cpu = time.perf_counter(), time.process_time()
    way(prefix, tokens)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
