"""One utterance's strings become what a batch can hold: token ids, prompt bytes, a task index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from espnet2.train.preprocessor import AbsPreprocessor

from pam_espnet.data.kaldi_io import check_matrix
from pam_espnet.errors import DataError
from pam_espnet.llm.prompt_layout import answer_ids, end_of_turn_id


def prompt_bytes(prompt: str) -> np.ndarray:
    """A prompt as a batch holds it: its UTF-8 bytes, int64."""
    return np.frombuffer(prompt.encode("utf-8"), dtype=np.uint8).astype(np.int64)


class PaMPreprocessor(AbsPreprocessor):
    """Tokenise the answer, encode the prompt as UTF-8 bytes (lossless, whatever its length), index the task.

    Args:
        tokenizer: the LLM's tokenizer; its vocabulary is never changed.
        tasks: task names in the model's order.
        train: kept for ESPnet's contract.
    """

    def __init__(self, tokenizer: Any, tasks: Sequence[str], train: bool) -> None:
        super().__init__(train)
        self.tokenizer = tokenizer
        self.tasks = list(tasks)
        self.end_id = end_of_turn_id(tokenizer)

    def __call__(self, uid: str, data: dict[str, Any]) -> dict[str, np.ndarray]:
        """
        Args:
            uid: utterance id, for error messages.
            data: strings ``text``, ``prompt``, ``task``; arrays (``speech``, ``num_samples``, ``feats_*``) pass
                through unchanged.

        Raises:
            DataError: unknown task, an empty prompt or answer, or cached features of another kind than were written.
        """
        data = dict(data)
        for name, value in data.items():
            if name.startswith("feats_"):
                check_matrix(value, f"utterance {uid!r}: {name}")
        task = str(data["task"]).strip()
        if task not in self.tasks:
            raise DataError("utt2task", f"utterance {uid!r}: unknown task {task!r}; known: {', '.join(self.tasks)}")
        for name in ("prompt", "text"):
            if not str(data[name]).strip():
                raise DataError(name, f"utterance {uid!r} has an empty {name}")
        data["task"] = np.array([self.tasks.index(task)], dtype=np.int64)
        data["prompt"] = prompt_bytes(str(data["prompt"]))
        data["text"] = np.array(answer_ids(self.tokenizer, str(data["text"]), self.end_id), dtype=np.int64)
        return data
