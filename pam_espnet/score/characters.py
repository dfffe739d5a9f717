"""Plain characters: the same words typed in other code points become the same text."""

import unicodedata

_PLAIN = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u02bb\u02bc\u00b4\u0060", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
    }
)


def plain(text: str) -> str:
    """``text`` in NFKC with ASCII's apostrophes, quotation marks and hyphens, without invisible format characters."""
    text = unicodedata.normalize("NFKC", text.translate(_PLAIN))
    return "".join(character for character in text if unicodedata.category(character) != "Cf")
