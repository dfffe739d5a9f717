"""The ways of decoding that ``decode.py`` compares, each in a separate process (``python decode_ways.py WAY ...``).

The process reads one request per line (JSON) from standard input and answers with one line on standard output:

    {"do": "search", "prefixes": FILE, "tokens": 24}    seconds, CPU seconds, peak memory, the tokens of each answer
    {"do": "profile", "prefixes": FILE, "tokens": 24}   where the CPU time goes

B utterances, K hypotheses, P prefix positions, D width.
"""

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pam_espnet.decode.shards import peak_memory, reset_peak_memory
from pam_espnet.engine.engine import Engine, make_engine
from pam_espnet.llm.llm import LLM
from pam_espnet.search.beam import beam_search
from pam_espnet.search.hypothesis import BeamOptions

Way = Callable[[list[Tensor], int], list[list[int]]]  # prefixes (P,D), tokens -> best answer of each


class Uncached:
    """An engine for ``beam_search`` that stores embeddings and runs all of them at every step."""

    eos_ids: tuple[int, ...] = ()

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def prefill(self, prefix: Tensor, lengths: Tensor) -> tuple[Tensor, Any]:
        state = SimpleNamespace(embeds=prefix, lengths=lengths, depths=[self.llm.num_layers] * len(lengths))

        def select(rows: Sequence[int]) -> None:
            index = torch.tensor(rows, device=lengths.device)
            state.embeds, state.lengths = state.embeds[index], state.lengths[index]
            state.depths = [self.llm.num_layers] * len(rows)

        state.select = select
        return self._run(state), state

    def step(self, tokens: Tensor, state: Any) -> Tensor:
        rows = torch.arange(len(tokens), device=tokens.device)
        state.embeds = torch.nn.functional.pad(state.embeds, (0, 0, 0, 1))
        state.embeds[rows, state.lengths] = self.llm.embed(tokens).to(state.embeds.dtype)
        state.lengths = state.lengths + 1
        return self._run(state)

    def _run(self, state: Any) -> Tensor:
        positions = torch.arange(state.embeds.shape[1], device=state.lengths.device)
        hidden = self.llm(state.embeds, positions < state.lengths[:, None])
        return self.llm.logits(hidden[torch.arange(len(hidden), device=hidden.device), state.lengths - 1])


def own(engine: Any, beam: int) -> Way:
    """This project's search over ``engine``; no end tokens, so that every way takes the same number of steps."""

    def run(prefixes: list[Tensor], tokens: int) -> list[list[int]]:
        options = BeamOptions(beam_size=beam, nbest=1, max_new_tokens=tokens, eos_ids=())
        lengths = torch.tensor([len(one) for one in prefixes], device=prefixes[0].device)
        padded = torch.nn.utils.rnn.pad_sequence(prefixes, batch_first=True)
        return [nbest[0].tokens for nbest in beam_search(engine, padded, lengths, options)]

    return run


def generate(lm: Any, beam: int) -> Way:
    """Transformers' beam search; prefixes of a batch padded on the left, as it requires."""

    def run(prefixes: list[Tensor], tokens: int) -> list[list[int]]:
        padded = torch.nn.utils.rnn.pad_sequence(prefixes, batch_first=True, padding_side="left")
        lengths = torch.tensor([len(one) for one in prefixes], device=padded.device)
        positions = torch.arange(padded.shape[1] - 1, -1, -1, device=padded.device)
        return lm.generate(
            inputs_embeds=padded,
            attention_mask=(positions < lengths[:, None]).long(),
            do_sample=False,
            num_beams=beam,
            max_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=0,
        ).tolist()

    return run


def espnet(llm: str, lm: Any, beam: int) -> Way:
    """ESPnet's own decoding with a Hugging Face causal LLM: ``Speech2Text._decode_single_sample``.

    ``Speech2Text.__init__`` wants a trained ESPnet experiment, so its attributes are set here to what it sets: the
    decoder is ESPnet's class, loaded by it from ``llm``, and the LLM that ``generate`` runs beside it is ``lm``. An
    utterance comes as the "encoder output"; the projection is an identity. Utterances one after the other: ESPnet's
    batches are for its own beam search only.
    """
    from espnet2.asr.decoder.hugging_face_transformers_decoder import HuggingFaceTransformersDecoder
    from espnet2.bin.asr_inference import Speech2Text

    decoder = HuggingFaceTransformersDecoder(
        lm.get_output_embeddings().weight.shape[0], lm.config.hidden_size, llm, causal_lm=True
    )
    del decoder.lm_head, decoder.decoder  # as Speech2Text does
    decoder.decoder_pretrained_params = decoder.lm_head_pretrained_params = None  # copies for training, not used here
    speech = Speech2Text.__new__(Speech2Text)
    speech.beam_search_transducer = None
    speech.hugging_face_model = lm
    speech.hugging_face_linear_in = decoder.linear_in
    speech.asr_model = SimpleNamespace(decoder=decoder, use_transducer_decoder=False)
    speech.converter = SimpleNamespace(ids2tokens=lambda ids: [str(one) for one in ids])
    speech.tokenizer = SimpleNamespace(tokens2text=" ".join)
    speech.nbest = 1

    def run(prefixes: list[Tensor], tokens: int) -> list[list[int]]:
        speech.hugging_face_decoder_conf = {
            "num_beams": beam,
            "do_sample": False,
            "max_new_tokens": tokens,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        answers = []
        for prefix in prefixes:
            ((_, _, _, hypothesis),) = speech._decode_single_sample(prefix)
            answers.append(hypothesis.yseq[1:].tolist())  # its first id is the last of the made-up prefix ids
        return answers

    return run


def load(args: argparse.Namespace) -> LLM:
    """The LLM alone, or with the LoRA of a trained experiment.

    Baselines run LoRA merged into the weights, the fair way to decode with it; the fused blocks merge it themselves.
    """
    fused = args.way == "fused"
    if not args.exp:
        return LLM.from_pretrained(
            args.llm, dtype=args.dtype, attention="sdpa", fused_decoding=fused, local_files_only=True
        ).eval()
    from pam_espnet.config import load_yaml
    from pam_espnet.fileio import MODEL_FILE, load_strict, read_trained
    from pam_espnet.model import build_model

    config = load_yaml(Path(args.exp) / "config.yaml")
    config["llm_conf"] = {**(config.get("llm_conf") or {}), "dtype": args.dtype, "fused_decoding": fused}
    model = build_model(config)
    load_strict(model, read_trained(Path(args.exp) / MODEL_FILE), args.exp)
    if not fused:
        for module in model.decoder.lm.modules():
            if hasattr(module, "merge") and hasattr(module, "get_base_layer"):
                module.merge()
    return model.decoder.eval()


def make(args: argparse.Namespace, llm: LLM) -> Way:
    """The way that ``args.way`` names."""
    if args.way == "generate":
        return generate(llm.lm, args.beam)
    if args.way == "espnet":
        return espnet(args.llm, llm.lm, args.beam)
    if args.way == "uncached":
        return own(Uncached(llm), args.beam)
    engine: Engine = make_engine(llm)
    engine.take_over()  # as pam_decode does
    return own(engine, args.beam)


def measure(way: Way, prefixes: list[Tensor], tokens: int, device: str) -> dict[str, Any]:
    """One search: seconds, CPU seconds, resident memory before it and at its peak."""
    if device == "cpu" and sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what earlier searches freed would count
    reset_peak_memory(device)
    rest = peak_memory(device)
    wall, cpu = time.perf_counter(), time.process_time()
    answers = way(prefixes, tokens)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall": wall, "cpu": cpu, "rest": rest, "peak": peak_memory(device), "answers": answers}


def profile(way: Way, prefixes: list[Tensor], tokens: int) -> dict[str, Any]:
    """Shares of the time of one search by operator (without those it calls)."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    began = time.perf_counter()
    with record(activities=[ProfilerActivity.CPU]) as found:
        way(prefixes, tokens)
    wall = 1e6 * (time.perf_counter() - began)
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    shares = {event.key: [event.count, event.self_cpu_time_total / wall] for event in events[:14]}
    rest = 1 - sum(event.self_cpu_time_total for event in events) / wall
    return {"seconds": wall / 1e6, "operators": shares, "outside": rest}


@torch.no_grad()
def reply(way: Way, request: dict[str, Any], device: str) -> dict[str, Any]:
    """What a request asks for."""
    prefixes = [one.to(device) for one in torch.load(Path(request["prefixes"]))]
    if request["do"] == "profile":
        return profile(way, prefixes, request["tokens"])
    return measure(way, prefixes, request["tokens"], device)


def main() -> None:
    """Serve requests until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=("generate", "espnet", "uncached", "transformers", "fused"))
    parser.add_argument("--llm", required=True)
    parser.add_argument("--exp", default="")
    parser.add_argument("--beam", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    way = make(args, load(args).to(args.device))
    print(json.dumps({"ready": args.way}), file=REPLIES, flush=True)
    for line in sys.stdin:
        print(json.dumps(reply(way, json.loads(line), args.device)), file=REPLIES, flush=True)


if __name__ == "__main__":
    REPLIES, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no reply
    main()
