"""The two framings of a clip: the number of people who speak, and whether it is n (speaker number verification).

Half of the verification questions of each number of voices ask for that number (yes); the others go round the ten other
numbers in turn (no). So each number is asked about equally often with either answer: the question tells nothing.
"""

from collections.abc import Mapping

from libricount import MOST

from pam_espnet.data.prompts import draw_prompt
from pam_espnet.data.rendering import seeded

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def asked_numbers(counts: Mapping[str, int], seed: int) -> dict[str, int]:
    """{clip: the number that its verification question asks about}; ``counts``: {clip: number of voices}."""
    asked: dict[str, int] = {}
    for count in range(MOST + 1):
        own = sorted(clip for clip, number in counts.items() if number == count)
        rng = seeded(seed, f"verify {count}")
        order = [own[row] for row in rng.permutation(len(own))]
        others = rng.permutation([number for number in range(MOST + 1) if number != count]).tolist()
        positive = (len(own) + count % 2) // 2
        for index, clip in enumerate(order):
            asked[clip] = count if index < positive else others[(index - positive) % len(others)]
    return asked


def questions(
    counts: Mapping[str, int], framings: list[str], wordings: Mapping[str, list[str]], seed: int
) -> dict[str, tuple[str, str, str, str]]:
    """{utterance: (clip, task, prompt, answer)}.

    Args:
        counts: {clip: number of voices}.
        framings: count, verify, or both.
        wordings: {framing: prompts}, from which one is drawn for each utterance.
        seed: of what is asked, and how.
    """
    table: dict[str, tuple[str, str, str, str]] = {}
    asked = asked_numbers(counts, seed)
    for clip, count in counts.items():
        if "count" in framings:
            key = f"count-{clip}"
            table[key] = (clip, "count", draw_prompt(wordings["count"], key, seed), str(count))
        if "verify" in framings:
            key = f"verify-{clip}"
            prompt = draw_prompt(wordings["verify"], key, seed).format(number=WORDS[asked[clip]])
            table[key] = (clip, "verify", prompt, "yes" if asked[clip] == count else "no")
    return table
