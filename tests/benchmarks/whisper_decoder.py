"""Word error rate of Whisper's own decoder on the recognition utterances of a data directory, by speaker.

Each utterance is in a window of 30 s, as Whisper was trained; its decoder loops on shorter ones. Both texts are
normalised as Whisper's are ("wer_normalised"). In the recipe's folder:

    python ../../../tests/benchmarks/whisper_decoder.py --model downloads/models/whisper-tiny.en \
        --data data/quick/test_voices --per_speaker 32
"""

import argparse
import random
from collections import defaultdict


def main() -> None:
    """Print the word error rate of every speaker and of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a Whisper of Hugging Face format")
    parser.add_argument("--data", required=True, help="data directory")
    parser.add_argument("--per_speaker", type=int, default=1000, help="at most this many of each speaker, at random")
    parser.add_argument("--speakers", nargs="+", metavar="NAME", help="only these, as in utt2spk")
    args = parser.parse_args()

    import torch
    from tqdm import tqdm
    from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

    from pam_espnet.data.audio import read_audio, resample
    from pam_espnet.data.datadir import validate
    from pam_espnet.score.intervals import bootstrap
    from pam_espnet.score.result import METRICS
    from pam_espnet.score.wer import score_wer

    torch.set_num_threads(1)
    model = WhisperForConditionalGeneration.from_pretrained(args.model).eval()
    extract = WhisperFeatureExtractor.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = validate(args.data)
    speakers = defaultdict(list)
    for key in sorted(key for key, task in data.utt2task.items() if task == "asr"):
        speakers[data.utt2spk[key]].append(key)
    if args.speakers:
        if unknown := set(args.speakers) - speakers.keys():
            there = ", ".join(sorted(speakers))
            parser.error(f"--speakers: {args.data} has no {', '.join(sorted(unknown))}, but {there}")
        speakers = {name: speakers[name] for name in args.speakers}
    rng = random.Random(0)
    chosen = {name: rng.sample(keys, min(args.per_speaker, len(keys))) for name, keys in sorted(speakers.items())}
    answers = {}
    for key in tqdm([key for keys in chosen.values() for key in keys], unit="utterance"):
        wave = resample(*read_audio(data.wav[key]), extract.sampling_rate)
        features = extract(wave, sampling_rate=extract.sampling_rate, return_tensors="pt").input_features
        with torch.inference_mode():
            tokens = model.generate(features, max_new_tokens=100)
        answers[key] = tokenizer.decode(tokens[0], skip_special_tokens=True)
    for name, keys in {**chosen, "all": list(answers)}.items():
        result = score_wer({key: data.text[key] for key in keys}, {key: answers[key] for key in keys})
        print(name, len(keys), METRICS["wer_normalised"].show(bootstrap(result.metrics["wer_normalised"])))


if __name__ == "__main__":
    main()
