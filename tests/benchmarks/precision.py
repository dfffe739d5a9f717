"""Cost and loss of the precisions of decoding: negative log-likelihood, time of a step, memory, batch invariance.

    plain     float32 weights as torch multiplies them, not packed (what every other way is compared with)
    float32   packed (the default)
    bfloat16  weights and activations
    int8      weights alone, activations in float32

Negative log-likelihoods are teacher-forced through the search's own path, a prefill and then a step per token, of text
that comes with every Python (pydoc_data) and, with --exp and --data, of reference answers after real audio (the same
prefixes for all ways). Times are CPU milliseconds, medians of rounds in which the ways take turns. A row's logits must
not depend on how many rows run beside it: the largest difference between rows of a batch of 32 and the same rows in
smaller batches is shown.

    python tests/benchmarks/precision.py --llm egs/mini/pam1/downloads/models/smollm2-135m-instruct
    python tests/benchmarks/precision.py --exp exp/pam_full --data dump/full/raw/dev     # in egs/mini/pam1
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

WAYS = ("plain", "float32", "bfloat16", "int8")
PREFIX, SPAN = 32, 96  # tokens of text: context, and those that count
BATCH = 16  # texts together


def main() -> None:
    """Print a table and, with --output, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", help="folder of a Llama-type causal LLM: text")
    parser.add_argument("--exp", help="experiment directory: answers, and text with its LoRA")
    parser.add_argument("--data", help="formatted data directory with the answers")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--texts", type=int, default=64, help=f"pieces of text of {PREFIX}+{SPAN} tokens (64)")
    parser.add_argument("--limit", type=int, default=0, help="answers (0: all)")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4], help="hypotheses per utterance (1 4)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="utterances (1 8)")
    parser.add_argument("--prefix", type=int, default=100, help="positions before timed steps (100)")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each way (5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    if (args.llm is None) == (args.exp is None):
        parser.error("give --llm or --exp")

    import torch

    torch.set_num_threads(args.threads)
    engines, prefixes, ready = {}, [], {}
    for way in args.ways:
        began = time.perf_counter()
        engines[way], speech = load(way, args.llm, args.exp)
        ready[way] = time.perf_counter() - began
        if args.data and not prefixes:
            prefixes = answer_prefixes(speech.model, args.data, args.limit)
    rows: dict[str, dict[str, Any]] = {way: {"ready_s": ready[way]} for way in args.ways}
    for way, engine in engines.items():
        rows[way]["packed_mb"] = packed_bytes(engine) / 2**20
        rows[way]["text"] = text_nll(engine, args.texts)
        if prefixes:
            rows[way]["answers"] = answer_nll(engine, prefixes)
        rows[way]["invariance"] = invariance(engine)
        print(way, rows[way], flush=True)
    for batch in args.batch:
        for beams in args.beams:
            for way, found in step_times(engines, batch, beams, args.prefix, args.rounds).items():
                rows[way][f"batch{batch}_beam{beams}"] = found
    for way, row in rows.items():
        print(f"{way:16s} " + "  ".join(show(name, value, rows[args.ways[0]][name]) for name, value in row.items()))
    if args.output:
        record = {
            "options": {key: str(value) for key, value in vars(args).items()},
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "rows": rows,
        }
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def show(name: str, value: Any, base: Any) -> str:
    """One cell, with its ratio to the first way."""
    if isinstance(value, dict):
        return f"{name}: " + " ".join(f"{key} {show('', value[key], base[key]).strip()}" for key in value)
    if name == "invariance":
        return f"{name}: {value:.1e}"
    return f"{name} {value:.4g} ({value / base:.4f})"


def load(way: str, llm: str | None, exp: str | None) -> tuple[Any, Any]:
    """An engine, and the whole model of an experiment or None."""
    from pam_espnet.decode.options import AnswerOptions
    from pam_espnet.decode.speech_llm import SpeechLLM
    from pam_espnet.engine import packed
    from pam_espnet.engine.engine import make_engine
    from pam_espnet.llm.llm import LLM

    helps = packed._blocks_help
    if way == "plain":
        packed._blocks_help = lambda _: False
    dtype = "bfloat16" if way == "bfloat16" else "float32"
    try:
        if llm is None:
            speech = SpeechLLM.load(str(exp), AnswerOptions(), dtype="int8" if way == "int8" else dtype)
            return speech.engine, speech
        model = LLM.from_pretrained(llm, dtype=dtype, attention="sdpa").eval()
        return make_engine(model, int8=way == "int8"), None
    finally:
        packed._blocks_help = helps


def packed_bytes(engine: Any) -> int:
    """What the search's own copy of the weights takes."""
    blocks = [layer for block in engine.blocks for layer in (block.qkv, block.out, block.gate_up, block.down)]
    return sum(layer.nbytes for layer in [*blocks, engine.output])


def forced_nll(engine: Any, prefix: Any, lengths: Any, answers: Sequence[Sequence[int]]) -> Iterator[float]:
    """Of each answer token, one step after the other; all answers stay until the longest is done."""
    import torch

    with torch.no_grad():
        logits, state = engine.prefill(prefix, lengths)
        for step in range(max(map(len, answers))):
            nll = -logits.log_softmax(-1)
            yield from (float(nll[row, answer[step]]) for row, answer in enumerate(answers) if step < len(answer))
            tokens = [answer[min(step, len(answer) - 1)] for answer in answers]
            logits = engine.step(torch.tensor(tokens), state)


def text_nll(engine: Any, count: int) -> float:
    """Of ``count`` pieces of Python's own help texts."""
    import pydoc_data.topics

    import torch

    ids = engine.llm.tokenizer("\n".join(pydoc_data.topics.topics.values()))["input_ids"]
    starts = [index * (len(ids) - PREFIX - SPAN) // count for index in range(count)]
    found: list[float] = []
    for at in range(0, count, BATCH):
        some = starts[at : at + BATCH]
        prefix = engine.llm.embed(torch.tensor([ids[start : start + PREFIX] for start in some])).detach()
        answers = [ids[start + PREFIX : start + PREFIX + SPAN] for start in some]
        found += forced_nll(engine, prefix, torch.full((len(some),), PREFIX), answers)
    return statistics.fmean(found)


def answer_prefixes(model: Any, data_dir: str, limit: int) -> list[tuple[str, Any, Any, list[list[int]]]]:
    """Batches of one task each: its name, prefixes (B,P,D) with audio, their lengths (B,), reference answers."""
    import torch

    from pam_espnet.data.datadir import DataDir
    from pam_espnet.decode.shards import read_wave

    data = DataDir.load(data_dir)
    found = []
    for task in sorted(set(data.utt2task.values())):
        keys = [key for key in data.utterances if data.utt2task[key] == task][: limit or None]
        for at in range(0, len(keys), BATCH):
            some = keys[at : at + BATCH]
            waves = [torch.from_numpy(read_wave(data, key, model.frontend.sample_rate)) for key in some]
            batch = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
            prompts = [data.prompt[key] for key in some]
            answers = [model.decoder.answer_ids(data.text[key], task) for key in some]
            with torch.no_grad():
                audio = model.audio_embeddings(prompts, torch.tensor([len(wave) for wave in waves]), batch)
                inputs = model.build_inputs(prompts, audio, None)
            found.append((task, inputs.embeds, inputs.prefix_lengths, answers))
    return found


def answer_nll(engine: Any, prefixes: Sequence[tuple[str, Any, Any, list[list[int]]]]) -> dict[str, float]:
    """Per answer token, by task."""
    found: dict[str, list[float]] = {}
    for task, *batch in prefixes:
        found.setdefault(task, []).extend(forced_nll(engine, *batch))
    every = [value for values in found.values() for value in values]
    return {**{task: statistics.fmean(values) for task, values in found.items()}, "all": statistics.fmean(every)}


def invariance(engine: Any) -> float:
    """Largest difference of logits between 32 rows together and 1, 3 and 8 of them, after a prefill and two steps."""
    import torch

    ids = torch.randint(0, engine.llm.vocab_size, (32, 22), generator=torch.Generator().manual_seed(0))

    def run(count: int) -> Any:
        with torch.no_grad():
            _, state = engine.prefill(engine.llm.embed(ids[:count, :20]), torch.full((count,), 20))
            return torch.stack([engine.step(ids[:count, at], state) for at in (20, 21)])

    whole = run(32)
    return max(float((run(count) - whole[:, :count]).abs().max()) for count in (1, 3, 8))


def step_times(
    engines: dict[str, Any], batch: int, beams: int, prefix: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Median CPU milliseconds of a prefill and of a step with ``batch * beams`` rows."""
    import torch

    times: dict[str, dict[str, list[float]]] = {way: {"prefill": [], "step": []} for way in engines}
    generator = torch.Generator().manual_seed(0)
    for turn in range(rounds + 1):
        for way, engine in engines.items():
            ids = torch.randint(0, engine.llm.vocab_size, (batch, prefix), generator=generator)
            began = time.process_time()
            _, state = engine.prefill(engine.llm.embed(ids), torch.full((batch,), prefix))
            prefilled = time.process_time()
            state.select([b for b in range(batch) for _ in range(beams)])
            steps = []
            for _ in range(8):
                tokens = torch.randint(0, engine.llm.vocab_size, (batch * beams,), generator=generator)
                start = time.process_time()
                engine.step(tokens, state)
                steps.append(time.process_time() - start)
            if turn > 0:  # the first round warms up
                times[way]["prefill"].append(1000 * (prefilled - began))
                times[way]["step"] += [1000 * one for one in steps]
    return {way: {name: statistics.median(values) for name, values in found.items()} for way, found in times.items()}


if __name__ == "__main__":
    main()
