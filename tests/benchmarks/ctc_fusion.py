"""What CTC beside the LLM is worth in ASR: word error rates of a trained experiment with and without it.

The CTC head is the one that the warm start left and joint training kept; both say the tokens of the task vocabulary.
Fusion runs in ESPnet's beam search (``pam_espnet.espnet_scorer``), scores being (1 - w) * LLM + w * CTC. The weight w
and whether scores are divided by the length are chosen on --dev; --test is decoded with that choice alone, beside

    ctc_greedy       the CTC head, best path, no LLM
    search           this project's beam search, all tokens
    search_tasks     the same with the task vocabulary
    llm              ESPnet's beam search with the LLM alone (w = 0)

    python tests/benchmarks/ctc_fusion.py --exp exp/mine --dev dump/raw/dev --test dump/raw/test_asr --output ctc.json

A run that was stopped goes on where it stopped: the output keeps the text of every utterance.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

BATCH = 8  # utterances decoded together
SCALES = ("sum", "mean")  # of a hypothesis' log-probabilities


def main() -> None:
    """Decode what is missing, print word error rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp", required=True, help="experiment directory with a CTC head")
    parser.add_argument("--dev", required=True, help="formatted data directory on which w is chosen")
    parser.add_argument("--test", required=True, help="formatted data directory on which it is judged")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9], help="values of w")
    parser.add_argument("--beam", type=int, default=4, help="hypotheses (4)")
    parser.add_argument("--pre_beam", type=float, default=10.0, help="LLM's candidates that CTC scores, in beams (10)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file with texts and rates")
    args = parser.parse_args()

    import torch

    from pam_espnet.score.intervals import bootstrap, bootstrap_difference

    torch.set_num_threads(args.threads)
    bench = Bench(args)
    dev = {name: bench.score(args.dev, name) for name in ("ctc_greedy", "search", "search_tasks")}
    fused = {(w, scale): f"{named(w)} {scale}" for w in (0.0, *args.weights) for scale in SCALES}
    dev |= {name: bench.score(args.dev, name, w) for (w, _), name in fused.items()}

    def best(with_ctc: bool) -> tuple[float, str]:
        return min((key for key in fused if bool(key[0]) == with_ctc), key=lambda key: dev[fused[key]].value or 0.0)

    chosen = best(True)
    test = {name: bench.score(args.test, name) for name in ("ctc_greedy", "search", "search_tasks")}
    for key in (best(False), chosen):
        test[fused[key]] = bench.score(args.test, fused[key], key[0])
    print(f"\nchosen on {args.dev}: {fused[chosen]}\n")
    rates: dict[str, Any] = {}
    for title, scores in (("dev", dev), ("test", test)):
        print(f"| {title}, decoding | WER % [95 % interval] | CPU s |\n| --- | --- | --- |")
        for name, ratio in scores.items():
            value, low, high = bootstrap(ratio)
            rates.setdefault(title, {})[name] = {"wer": value, "low": low, "high": high}
            where = args.dev if title == "dev" else args.test
            seconds = bench.record["seconds"][f"{where} {name.removesuffix(' sum').removesuffix(' mean')}"]
            print(f"| {name} | {value:.1f} [{low:.1f}, {high:.1f}] | {seconds:.0f} |")
        print()
    for other in ("search", "search_tasks", fused[best(False)]):
        value, low, high = bootstrap_difference(test[other], test[fused[chosen]])
        rates[f"test: {fused[chosen]} minus {other}"] = {"wer": value, "low": low, "high": high}
        print(f"test, {fused[chosen]} minus {other}: {value:+.1f} [{low:+.1f}, {high:+.1f}]")
    bench.record |= {"rates": rates, "chosen": fused[chosen]}
    bench.save()


def named(weight: float) -> str:
    """A weight of CTC in tables."""
    return f"llm+ctc {weight:g}" if weight else "llm"


def _rankings(ended: Any) -> list[list[float]]:
    """Scores of ESPnet's hypotheses in the order of ``SCALES``; a mean is over the tokens and the end."""
    sums = [float(one.score) for one in ended]
    return [sums, [score / (len(one.yseq) - 1) for score, one in zip(sums, ended, strict=True)]]


class Bench:
    """The model, and the texts that were decoded so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        from pam_espnet.decode.options import AnswerOptions
        from pam_espnet.decode.speech_llm import SpeechLLM

        self.args = args
        options = {"beam_size": args.beam, "max_new_tokens": 64}
        self.model = SpeechLLM.load(args.exp, AnswerOptions.from_dict({**options, "task_vocabulary": True}))
        self.free = SpeechLLM(self.model.model, AnswerOptions.from_dict(options))
        self.record: dict[str, Any] = {"texts": {}, "seconds": {}}
        if args.output.exists():
            self.record = json.loads(args.output.read_text(encoding="utf-8"))
        given = {key: str(value) for key, value in vars(args).items() if key in ("exp", "beam", "pre_beam")}
        if self.record.setdefault("options", given) != given:
            raise SystemExit(f"{args.output} is of other options: {self.record['options']}; name another --output")
        self._audio: dict[str, list[tuple[str, Any, Any]]] = {}

    def save(self) -> None:
        """Write what there is."""
        self.args.output.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")

    def score(self, data_dir: str, name: str, weight: float | None = None) -> Any:
        """Word errors of one way (``pam_espnet.score.intervals.Ratio``); a search yields both scales' texts."""
        from tqdm import tqdm

        from pam_espnet.score.wer import score_wer

        names = [name] if weight is None else [f"{named(weight)} {scale}" for scale in SCALES]
        texts = [self.record["texts"].setdefault(f"{data_dir} {one}", {}) for one in names]
        data, keys = self.data(data_dir)
        clock = f"{data_dir} {names[0].removesuffix(f' {SCALES[0]}')}"
        began, before = time.process_time(), self.record["seconds"].get(clock, 0.0)
        todo = [one for one in self.audio(data_dir) if one[0] not in texts[0]]
        for batch in tqdm(batches(todo), desc=name):
            keys_of, frames, (prompt, *_) = ([one[i] for one in batch] for i in range(3))
            if weight is None:
                found = [[text] for text in self.plain(name, frames, prompt)]
            else:
                found = self.espnet(frames, prompt, weight)
            for key, own in zip(keys_of, found, strict=True):
                for known, text in zip(texts, own, strict=True):
                    known[key] = text
            self.record["seconds"][clock] = before + time.process_time() - began
            self.save()
        result = score_wer({key: data.text[key] for key in keys}, texts[names.index(name)]).metrics["wer"]
        print(f"{data_dir} {name}: WER {result.value:.1f} %", flush=True)
        return result

    def data(self, data_dir: str) -> Any:
        """The data directory and its ASR utterances."""
        from pam_espnet.data.datadir import DataDir

        data = DataDir.load(data_dir)
        return data, [key for key in data.utterances if data.utt2task[key] == "asr"]

    def audio(self, data_dir: str) -> list[tuple[str, Any, str]]:
        """(utterance, audio embeddings (U,D), prompt) of each; encoded once."""
        import torch

        from pam_espnet.decode.shards import read_wave

        file = self.args.output.with_suffix(f".{Path(data_dir).name}.pt")
        if data_dir not in self._audio and file.exists():
            self._audio[data_dir] = torch.load(file)
        if data_dir not in self._audio:
            data, keys = self.data(data_dir)
            model, found = self.model.model, []
            for key in keys:
                wave = torch.from_numpy(read_wave(data, key, model.frontend.sample_rate))
                with torch.no_grad():
                    audio = model.audio_embeddings([data.prompt[key]], torch.tensor([len(wave)]), wave[None])
                found.append((key, audio.embeddings[0], data.prompt[key]))
            self._audio[data_dir] = found
            torch.save(found, file)
        return self._audio[data_dir]

    def plain(self, name: str, frames: list[Any], prompt: str) -> list[str]:
        """Best path of CTC, or this project's search."""
        import torch

        from pam_espnet.frontend.frontend import AudioEmbeddings
        from pam_espnet.search.beam import beam_search

        speech = self.model.model
        lengths, padded = torch.tensor([len(one) for one in frames]), pad(frames)
        if name == "ctc_greedy":
            return [self.model.text(tokens) for tokens in speech.ctc.greedy(padded, lengths)]
        answers = self.model if name == "search_tasks" else self.free
        placed = speech.place([prompt] * len(frames), AudioEmbeddings(padded, lengths, None), None)
        nbest = beam_search(answers.decoder, placed.embeds, placed.prefix_lengths, answers.options.beam)
        return [answers.text(answers.decoder.tokens(best.tokens)) for (best,) in nbest]

    def espnet(self, frames: list[Any], prompt: str, weight: float) -> list[list[str]]:
        """The best text of each utterance by ESPnet's search, for each of ``SCALES``."""
        import torch
        from espnet2.legacy.nets.batch_beam_search import BatchBeamSearch
        from espnet2.legacy.nets.scorers.ctc import CTCPrefixScorer

        from pam_espnet.espnet_scorer import LLMScorer, SharedCTC

        llm = LLMScorer(self.model.decoder, prompt)
        search = BatchBeamSearch(
            {"llm": llm, "ctc": CTCPrefixScorer(SharedCTC(self.model.model.ctc, llm), llm.eos)},
            {"llm": 1 - weight, "ctc": weight},
            beam_size=self.args.beam,
            vocab_size=llm.vocab_size,
            sos=llm.eos,
            eos=llm.eos,
            pre_beam_ratio=self.args.pre_beam,
            pre_beam_score_key="full",
        )
        texts = []
        for ended in search(pad(frames), x_lengths=torch.tensor([len(one) for one in frames])):
            own = []
            for scores in _rankings(ended):
                best = max(zip(scores, ended, strict=True), key=lambda pair: pair[0], default=(0.0, None))[1]
                own.append(self.model.text(llm.tokens(best.yseq)) if best else "")
            texts.append(own)
        return texts


def pad(frames: list[Any]) -> Any:
    """(B,U,D) of audio embeddings (U,D)."""
    import torch

    return torch.nn.utils.rnn.pad_sequence(frames, batch_first=True)


def batches(utterances: list[tuple[str, Any, str]]) -> list[list[tuple[str, Any, str]]]:
    """At most ``BATCH`` utterances of one prompt and of like length."""
    ordered = sorted(utterances, key=lambda one: (one[2], len(one[1])))
    found: list[list[tuple[str, Any, str]]] = []
    for one in ordered:
        if found and len(found[-1]) < BATCH and found[-1][0][2] == one[2]:
            found[-1].append(one)
        else:
            found.append([one])
    return found


if __name__ == "__main__":
    main()
