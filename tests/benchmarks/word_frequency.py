"""Word errors of a decoding by how often training has the word: what a larger vocabulary could bring.

    python ../../../tests/benchmarks/word_frequency.py --train data/quick/train --data data/quick/test_asr \\
        --decoded exp/pam_quick/decode_beam/test_asr

Prints, for words of the references that are in no transcript of training, in one to three, and in more: how many there
are, and how many are substituted or deleted; and the insertions.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping

import jiwer

CLASSES = ("none", "1 to 3", "more")


def counts(
    training: Iterable[str], references: Mapping[str, str], hypotheses: Mapping[str, str]
) -> tuple[dict[str, tuple[int, int]], int]:
    """Words and errors for each of ``CLASSES``, and insertions."""
    seen = Counter(word for text in training for word in set(text.split()))
    words: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    insertions = 0
    for key, text in references.items():
        found = jiwer.process_words(" ".join(text.split()), " ".join(hypotheses[key].split()))
        for chunk in found.alignments[0]:
            insertions += chunk.hyp_end_idx - chunk.hyp_start_idx if chunk.type == "insert" else 0
            for word in found.references[0][chunk.ref_start_idx : chunk.ref_end_idx]:
                name = CLASSES[0 if not seen[word] else 1 if seen[word] <= 3 else 2]
                words[name] += 1
                errors[name] += chunk.type != "equal"
    return {name: (words[name], errors[name]) for name in CLASSES}, insertions


def main() -> None:
    """Print the table of one decoding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="data directory of training")
    parser.add_argument("--data", required=True, help="data directory that was decoded")
    parser.add_argument("--decoded", required=True, help="folder of its decoding, which has text")
    args = parser.parse_args()

    from pam_espnet.data.tables import read_table

    texts, tasks = read_table(f"{args.train}/text"), read_table(f"{args.train}/utt2task")
    training = [text for key, text in texts.items() if tasks[key] == "asr"]
    table, insertions = counts(training, read_table(f"{args.data}/text"), read_table(f"{args.decoded}/text"))
    for name, (words, errors) in table.items():
        print(f"in training {name:<7}{words:>6} words{errors:>6} wrong")
    print(f"insertions {insertions}")


if __name__ == "__main__":
    main()
