"""A byte-level BPE of at most 300 entries with the ChatML turn marks, made in a second and without a download."""

from typing import Any

# ChatML: the layout that SmolLM2 and Qwen use. An absent system turn stays absent.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SENTENCES = (
    "Transcribe the speech.",
    "How many people are speaking?",
    "Describe the sounds.",
    "A dog barks while rain falls on the roof.",
    "The number you have dialed is not in service.",
    "two people are speaking at the same time",
    "user assistant system",
)


def tiny_tokenizer() -> Any:
    """``<|im_end|>`` ends an answer, ``<|endoftext|>`` is the padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
