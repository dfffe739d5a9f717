"""Transcripts as training targets: lower case, no punctuation but apostrophes, numbers spelled out as they are read."""

import re

from pam_espnet.errors import DataError

TO_NINE = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = ("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
ONES = (*TO_NINE, "ten", "eleven", "twelve", *TEENS)
TENS = ("zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# Slips of the packages' lists, and signs that are read as words.
REPLACE = {
    "*": " star ",
    "#": " pound ",
    "&": " and ",
    "3d": "three d",
    "28.8": "twenty eight point eight",
    "h.323": "h three two three",
    "www.asterisk.org": "www dot asterisk dot org",
    "a.m.": "a m",
    "p.m.": "p m",
    "represenatives": "representatives",
    "umute": "unmute",
    "un-indentified": "unidentified",
    "witheld": "withheld",
    "de-activated": "deactivated",
    "exclaimation": "exclamation",
    "rerecord": "re record",
    "xray": "x ray",
    "mountaingoat": "mountain goat",
    "1844": "eighteen forty four",
    "1940's": "nineteen forties",
    "1948": "nineteen forty eight",
    "a amiable": "amiable",  # the LibriVox list repeats the reader's slip
}
PLAIN = str.maketrans("’‘“”—…", "''    ")
REPLACE_PATTERN = re.compile("|".join(rf"(?<!\w){re.escape(old)}(?!\w)" for old in REPLACE if old[0].isalnum()))


def spell_number(digits: str) -> str:
    """A number in words: below 100 as a number, whole hundreds as such, anything else digit by digit."""
    value = int(digits)
    if value < 20:
        return ONES[value]
    if value < 100:
        return TENS[value // 10] + (f" {ONES[value % 10]}" if value % 10 else "")
    if value % 100 == 0 and value < 1000:
        return f"{ONES[value // 100]} hundred"
    return " ".join(ONES[int(digit)] for digit in digits)


def normalise(text: str) -> str:
    """``text`` as a target: notes in brackets dropped, lower case, words of a to z and apostrophes, single spaces.

    Raises:
        DataError: a character that this table of English texts does not know.
    """
    spoken = re.sub(r"\[[^\]]*\]|\([^)]*\)|<[^>]*>", " ", text).lower()
    spoken = spoken.translate(PLAIN)
    spoken = REPLACE_PATTERN.sub(lambda match: REPLACE[match[0]], spoken)
    for sign in "*#&":
        spoken = spoken.replace(sign, REPLACE[sign])
    spoken = re.sub(r"\d+", lambda match: f" {spell_number(match[0])} ", spoken)
    spoken = re.sub(r"[-.,;:!?\"/]", " ", spoken)
    # an apostrophe belongs to a word only between or after letters
    spoken = re.sub(r"(?<![a-z])'|'(?![a-z ]|$)", " ", spoken)
    if strange := sorted(set(re.findall(r"[^a-z' ]", " ".join(spoken.split())))):
        raise DataError("transcript", f"{text!r} contains {strange[0]!r}", hint="add it to REPLACE in local/text.py")
    return " ".join(spoken.split())
