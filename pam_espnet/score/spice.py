"""SPICE 1.0: the part of the scene (objects, attributes, relations) that a caption shares with its references.

Anderson et al., "SPICE: Semantic Propositional Image Caption Evaluation" (ECCV 2016), by the authors' Java program,
which parses all captions with Stanford CoreNLP 3.6.0. Slow, and gigabytes of memory.
"""

import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.score.parts import UnavailableError, find_part, run_java


def spice(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """F-score of each hypothesis's tokens against those of its references, in [0, 1].

    An undefined score (a caption without anything in it) counts as 0.
    Raises UnavailableError: the program, CoreNLP or a Java runtime is not installed, or it fails.
    """
    jar = find_part("spice", "spice-1.0.jar")
    find_part("spice", "lib", "stanford-corenlp-3.6.0-models.jar")
    entries = [
        {"image_id": row, "test": " ".join(given), "refs": [" ".join(tokens) for tokens in wanted]}
        for row, (given, wanted) in enumerate(zip(hypotheses, references, strict=True))
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in.json").write_text(json.dumps(entries), encoding="utf-8")
        memory = os.environ.get("PAM_SPICE_MEMORY", "8G")
        arguments = [f"-Xmx{memory}", "-jar", jar.name, str(folder / "in.json"), "-out", str(folder / "out.json")]
        # A cache of this run alone: two runs that share one are known to hang.
        arguments += ["-cache", str(folder / "cache"), "-subset", "-silent"]
        (folder / "cache").mkdir()
        run_java(arguments, "", seconds=1800 + 5 * len(entries), cwd=jar.parent.resolve())
        try:
            found = json.loads((folder / "out.json").read_text(encoding="utf-8"))
            scores = {entry["image_id"]: entry["scores"]["All"]["f"] for entry in found}
            values = [float(scores[row] or 0.0) for row in range(len(entries))]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnavailableError(f"SPICE wrote no scores that can be read: {error!r}") from error
    return [0.0 if math.isnan(value) else value for value in values]
