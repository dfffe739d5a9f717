"""Prefixes of unequal length, searched here and by transformers' ``generate``."""

from typing import Any

import torch
from torch import Tensor

from pam_espnet.llm.llm import LLM
from pam_espnet.search.beam import beam_search
from pam_espnet.search.hypothesis import BeamOptions

LENGTHS = [1, 9, 4, 12, 3, 7]
# Frequent tokens of the random model, so that hypotheses end early, late and never.
EOS = (74, 7, 40)


def make_prefix() -> Tensor:
    """(B,P,D) for the tiny LLM."""
    return 0.5 * torch.randn(len(LENGTHS), max(LENGTHS), 32, generator=torch.Generator().manual_seed(3))


def search(engine: Any, prefix: Tensor, rows: list[int], options: BeamOptions, **more: Any) -> Any:
    """The n-best of ``rows``; what lies behind an utterance's own length is poisoned."""
    lengths = torch.tensor([LENGTHS[row] for row in rows])
    batch = prefix[rows, : int(lengths.max())].clone()
    for b, length in enumerate(lengths.tolist()):
        batch[b, length:] = 1e4
    return beam_search(engine, batch, lengths, options, **more)


def generate(llm: LLM, embeds: Tensor, options: BeamOptions, **more: Any) -> list[tuple[list[int], float]]:
    """The same search of one utterance (P,D) by transformers, without padding: its n-best tokens and scores."""
    return generate_batch(llm, [embeds], options, **more)[0]


def generate_batch(
    llm: LLM, prefixes: list[Tensor], options: BeamOptions, **more: Any
) -> list[list[tuple[list[int], float]]]:
    """The same search of several utterances, each (P,D), by transformers in one batch, padded on the left."""
    eos = list(options.eos_ids or llm.eos_ids)
    most = max(map(len, prefixes))
    padded = torch.stack([torch.nn.functional.pad(one, (0, 0, most - len(one), 0)) for one in prefixes])
    mask = torch.stack([torch.arange(most) >= most - len(one) for one in prefixes]).long()
    output = llm.lm.generate(
        inputs_embeds=padded,
        attention_mask=mask,
        do_sample=False,
        num_beams=options.beam_size,
        num_return_sequences=options.nbest,
        max_new_tokens=options.max_new_tokens,
        min_new_tokens=options.min_new_tokens,
        length_penalty=options.length_penalty,
        early_stopping=options.early_stopping,
        eos_token_id=eos,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **more,
    )
    results = []
    for i, sequence in enumerate(output.sequences.tolist()):
        end = next((at + 1 for at, token in enumerate(sequence) if token in eos), len(sequence))
        if options.beam_size == 1:
            scores = [step[i].log_softmax(-1)[token].item() for step, token in zip(output.logits, sequence)]  # noqa: B905
            score = sum(scores[:end]) / end**options.length_penalty
        else:
            score = output.sequences_scores[i].item()
        results.append((sequence[:end], score))
    return [results[at : at + options.nbest] for at in range(0, len(results), options.nbest)]
