"""What the preprocessor refuses before a batch is made."""

from pathlib import Path

import numpy as np
import pytest

from pam_espnet.errors import DataError
from pam_espnet.train.iterator import PaMPreprocessor


@pytest.mark.parametrize(
    ("features", "message"),
    [(np.ones((4, 6)), "dtype float64"), (np.full((4, 6), np.nan, dtype=np.float32), "NaN or infinite")],
)
def test_cached_features_of_another_kind_are_refused(tiny_llm_dir: Path, features: np.ndarray, message: str) -> None:
    from transformers import AutoTokenizer

    preprocess = PaMPreprocessor(AutoTokenizer.from_pretrained(tiny_llm_dir), ["asr"], train=True)
    data = {"text": "A", "prompt": "B", "task": "asr", "feats_mock": np.ones((4, 6), dtype=np.float32)}
    assert preprocess("utt1", data)["feats_mock"].shape == (4, 6)
    with pytest.raises(DataError, match=f"utterance 'utt1': feats_mock: has .*{message}"):
        preprocess("utt1", {**data, "feats_mock": features})


def test_each_task_has_its_own_answer_prefix(tiny_llm_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llm_dir)
    preprocess = PaMPreprocessor(tokenizer, ["asr", "count"], train=True, answer_prefix={"asr": " "})
    asr, count = (
        preprocess("utt1", {"text": "two people", "prompt": "B", "task": t})["text"] for t in ("asr", "count")
    )
    assert tokenizer.decode(asr[:-1]) == " two people" and tokenizer.decode(count[:-1]) == "two people"
