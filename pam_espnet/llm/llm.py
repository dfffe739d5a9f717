"""The LLM as training runs it: any Hugging Face causal LM, frozen, with LoRA beside it.

No token is added to its vocabulary and its tokenizer is kept as it is. Decoding runs an ``engine.Engine`` made from it.

B utterances, P positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from pam_espnet.config import check_number
from pam_espnet.errors import ConfigError, PamError
from pam_espnet.llm.lora import add_lora, lora_off, lora_precision, set_lora_training
from pam_espnet.llm.prompt_layout import Inputs, answer_ids, check_answer_prefix, end_of_turn_id, layout
from pam_espnet.llm.quantize import check_layers, check_quantize, loading_options
from pam_espnet.llm.shard import load_sharded, shard_mesh, wanted_by_any
from pam_espnet.llm.sources import choose_dtype, hub_source, load_tokenizer

# Settings of models whose logits are more than final norm + output layer; exit_logits and loss would be wrong.
_SCALED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


class TokenLosses(NamedTuple):
    """Of every answer token of a batch."""

    nll: Tensor  # float32 (targets,), negative log-likelihood
    correct: Tensor  # bool (targets,), whether the most likely token was the target
    exit_nll: Tensor | None  # float32 (targets,), the same from an intermediate block


class LLM(nn.Module):
    """A frozen causal LLM with optional LoRA.

    Args:
        lm: a transformers causal LM; it is frozen in place.
        tokenizer: its tokenizer, with a chat template.
        lora: options of ``llm.lora.add_lora``, or None for a frozen LLM.
        gradient_checkpointing: recompute activations in the backward pass (less memory, more time): True those of every
            block, a number N of every N-th block. "auto": none, but training on a GPU sets the least that fits.
        prompt_position: where the prompt vector is read: "prompt" (last token of the prompt text) or "template" (last
            token of the whole template).
        system: system prompt of every conversation; "" is an empty one, None the template's default.
        answer_prefix: task -> white space before its answers, see ``prompt_layout.check_answer_prefix``.
        fused_decoding: decode with the engine's own blocks where the LLM is of that kind; False goes through
            transformers, slower and without a packed copy.

    Attributes:
        width: D, size of the embeddings.
        num_layers: transformer blocks.
        vocab_size: V, rows of the embedding matrix.
        eos_ids: tokens that end an answer, the chat template's end of turn first.

    Raises ConfigError: a value out of range, or an LLM whose logits are not final norm + output layer.
    """

    def __init__(
        self,
        lm: Any,
        tokenizer: Any,
        lora: Mapping[str, Any] | None = None,
        gradient_checkpointing: bool | int | str = False,
        prompt_position: str = "prompt",
        system: str | None = "",
        fused_decoding: bool = True,
        answer_prefix: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        if prompt_position not in ("prompt", "template"):
            raise ConfigError(f"prompt_position must be 'prompt' or 'template', not {prompt_position!r}")
        if scaled := [name for name in _SCALED_LOGITS if getattr(lm.config, name, None) not in (None, 1, 1.0)]:
            raise ConfigError(f"this LLM scales its logits ({', '.join(scaled)}), which is not supported yet")
        self.lm: Any = lm.requires_grad_(False)
        self.tokenizer = tokenizer
        self.prompt_position = prompt_position
        self.system = system
        self.answer_prefix = check_answer_prefix(tokenizer, answer_prefix or {})
        self.fused_decoding = fused_decoding
        if lora is not None:
            add_lora(lm, lora)
        self.recompute(gradient_checkpointing)
        self.vocab_size: int
        self.width: int
        self.vocab_size, self.width = lm.get_input_embeddings().weight.shape
        self.num_layers: int = lm.config.num_hidden_layers
        self.end_id = end_of_turn_id(tokenizer)
        named = lm.generation_config.eos_token_id if lm.generation_config is not None else None
        ends = [self.end_id, tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(int(token) for token in ends if token is not None))
        self.freed = False  # whether an engine took the weights
        self._lookup: Callable[[Tensor], Tensor] | None = None  # replaces the embedding matrix once that is freed
        self._prompt_vectors: dict[str, Tensor] = {}
        self.shard_group: ProcessGroup | None = None  # of the processes that hold the blocks together
        self.register_load_state_dict_post_hook(_forget_prompt_vectors)
        self.train(self.training)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str,
        lora: Mapping[str, Any] | None = None,
        dtype: str = "auto",
        attention: str = "auto",
        revision: str | None = None,
        local_files_only: bool = False,
        chat_template: str | None = None,
        shard: str | None = None,
        quantize: str | None = None,
        **options: Any,
    ) -> LLM:
        """Load from a Hugging Face folder or id.

        Args:
            path_or_id: a folder (nothing is fetched), or an id such as "org/name".
            lora: as in the constructor.
            dtype: "float32", "bfloat16", or "auto": bfloat16 where the device (CUDA or CPU) computes it faster,
                else float32.
            attention: transformers' attention implementation ("sdpa", "eager", "flash_attention_2"), or "auto":
                "sdpa", but "eager" for bfloat16 on a CPU, where the fused kernel's backward pass is slower.
            revision: commit, branch or tag of an id.
            local_files_only: for an id: use the local Hugging Face cache only.
            chat_template: a Jinja text or file that replaces the tokenizer's own.
            shard: for training an LLM that does not fit on a GPU: its blocks are sharded over the processes of each
                node ("node") or over all ("all"); None: every process holds it whole, as one process always does.
            quantize: "nf4" rounds the frozen weights to 4 bits, for training with less memory; needs the extra
                "quantize". Decoding reads them rounded, too, and holds them in ``dtype``. Not together with ``shard``.
            options: further options of the constructor.

        Raises ConfigError: no such folder or id, or a value out of range.
        """
        from transformers import AutoModelForCausalLM

        chosen = choose_dtype(dtype)
        if attention == "auto":
            attention = "eager" if chosen == torch.bfloat16 and not torch.cuda.is_available() else "sdpa"
        source = hub_source(path_or_id, revision, local_files_only)
        tokenizer = load_tokenizer(path_or_id, revision, local_files_only, chat_template)
        check_quantize(quantize, shard)
        mesh = shard_mesh(shard)
        try:
            if mesh is not None:
                lm = load_sharded(path_or_id, mesh, chosen, attention, source)
            else:
                load, source = AutoModelForCausalLM.from_pretrained, source | loading_options(quantize, chosen)
                lm = load(path_or_id, dtype=chosen, attn_implementation=attention, **source)
                check_layers(lm)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"cannot load the LLM {path_or_id!r}: {error}") from error
        llm = cls(lm, tokenizer, lora=lora, **options)
        llm.shard_group = None if mesh is None else mesh.get_group()
        return llm

    def recompute(self, gradient_checkpointing: bool | int | str) -> None:
        """Recompute activations as the option says; it was none before."""
        self.gradient_checkpointing = recomputed_every(gradient_checkpointing)
        if every := self.gradient_checkpointing:
            self.lm.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)

    def train(self, mode: bool = True) -> LLM:
        """Training mode switches on LoRA's dropout alone; the frozen LLM's dropout stays off."""
        super().train(mode)
        self.lm.eval()
        set_lora_training(self.lm, mode)
        if self.gradient_checkpointing:
            for layer in self.transformer.layers:
                layer.training = mode  # the flag by which transformers decides to checkpoint; not recursive
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> LLM:
        """Devices change, dtypes do not: a trainer's ``model.to(dtype)`` must not blow a bfloat16 LLM up."""
        self._prompt_vectors.clear()  # they are on the old device
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), recurse)

    @property
    def transformer(self) -> Any:
        """The blocks without the output layer."""
        return self.lm.base_model

    @property
    def device(self) -> torch.device:
        return self.lm.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights and of the hidden states."""
        return self.lm.get_input_embeddings().weight.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) -> input embeddings (...,D)."""
        return self.lm.get_input_embeddings()(ids) if self._lookup is None else self._lookup(ids)

    def answer_ids(self, text: str, task: str) -> list[int]:
        """Token ids of an answer to a prompt of ``task``, with the end token."""
        return answer_ids(self.tokenizer, text, self.end_id, self.answer_prefix.get(task, ""))

    def forward(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Hidden states after the final norm: right-padded embeddings (B,P,D) of any floating dtype -> (B,P,D) in the
        LLM's dtype. ``mask`` (B,P) bool is False on padding, where rows are meaningless."""
        return self._outputs(embeds, mask).last_hidden_state

    def _outputs(self, embeds: Tensor, mask: Tensor | None, **options: Any) -> Any:
        if self.freed:
            raise PamError("the LLM's weights were handed to the engine and freed; load the experiment again")
        positions = torch.arange(embeds.size(1), device=embeds.device).expand(embeds.shape[:2])
        with lora_precision(self.lm):
            # use_cache=False: keys and values are not kept, and gradient checkpointing is allowed.
            return self.transformer(
                inputs_embeds=embeds.to(self.dtype),
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
                **options,
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states after the final norm (...,D) -> float32 logits (...,V)."""
        return self.lm.get_output_embeddings()(hidden).float()

    def exit_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states of any block (...,D) -> float32 logits (...,V), through the shared final norm."""
        return self.logits(self.final_norm(hidden))

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last block and the output layer."""
        for name in _NORM_NAMES:
            if isinstance(norm := getattr(self.transformer, name, None), nn.Module):
                return norm
        raise ConfigError(f"{type(self.transformer).__name__} has no final norm under a known name {_NORM_NAMES}")

    def token_losses(self, inputs: Inputs, exit_layer: int | None = None) -> TokenLosses:
        """Negative log-likelihood of each answer token; logits are computed only where there is a target. The output of
        the block ``exit_layer`` (from 1) predicts the tokens too, through the shared final norm and output layer."""
        outputs = self._outputs(inputs.embeds, needed_mask(inputs.mask), output_hidden_states=exit_layer is not None)
        logits = self.logits(outputs.last_hidden_state.flatten(0, 1)[inputs.target_index])  # (targets,V)
        nll = F.cross_entropy(logits, inputs.target_ids, reduction="none")
        correct = logits.detach().argmax(-1) == inputs.target_ids
        if exit_layer is None:
            return TokenLosses(nll, correct, None)
        hidden = outputs.hidden_states[exit_layer].flatten(0, 1)[inputs.target_index]
        exit_nll = F.cross_entropy(self.exit_logits(hidden), inputs.target_ids, reduction="none")
        return TokenLosses(nll, correct, exit_nll)

    def prompt_vectors(self, prompts: Sequence[str]) -> Tensor:
        """``prompt_vector`` of each, (B,D). Of a sharded LLM all processes call it together, and each computes what one
        of them lacks."""
        lacking = dict.fromkeys(prompt for prompt in prompts if prompt not in self._prompt_vectors)
        for prompt in wanted_by_any(lacking, self.shard_group):
            self.prompt_vector(prompt)
        return torch.stack([self.prompt_vector(prompt) for prompt in prompts])

    @torch.no_grad()
    def prompt_vector(self, prompt: str) -> Tensor:
        """(D,) float32: the base LLM's last hidden state at the end of the prompt, without audio and without LoRA.

        It depends on the frozen weights alone, so each distinct prompt is computed once.
        """
        if prompt not in self._prompt_vectors:
            parts = layout(self.tokenizer, prompt, self.system)
            ids = parts.head_ids + (parts.prompt_ids if self.prompt_position == "prompt" else parts.tail_ids)
            with lora_off(self.lm):
                embeds = self.embed(torch.tensor([ids], device=self.device))
                hidden = self(embeds, torch.ones_like(embeds[..., 0], dtype=torch.bool))
            self._prompt_vectors[prompt] = hidden[0, -1].float()
        return self._prompt_vectors[prompt]

    def forget_prompts(self, most: int) -> None:
        """Forget all prompt vectors where there are more than ``most``; they are computed again when needed."""
        if len(self._prompt_vectors) > most:
            self._prompt_vectors.clear()

    def free(self, lookup: Callable[[Tensor], Tensor] | None = None) -> None:
        """Free the weights of the blocks and of the output layer for good; ``embed`` and known prompt vectors stay.
        ``lookup`` does what ``embed`` does, without the embedding matrix, which is then freed, too."""
        table, output = self.lm.get_input_embeddings(), self.lm.get_output_embeddings()
        weights = [*self.transformer.layers.parameters()]
        weights += [] if output.weight is table.weight else [output.weight]
        if lookup is not None:
            self._lookup = lookup
            weights.append(table.weight)
        for weight in weights:
            weight.data = weight.data.new_empty(0)
        self.freed = True


def recomputed_every(option: Any) -> int:
    """N of ``gradient_checkpointing`` where every N-th block is recomputed in the backward pass; 0: none, or "auto".
    Raises ConfigError: it is neither auto nor false nor true nor a number of blocks."""
    if option == "auto":
        return 0
    every = int(option or 0) if option in (None, False, True) else option
    check_number(every, "llm_conf.gradient_checkpointing", at_least=0, whole=True)
    return every


def needed_mask(mask: Tensor) -> Tensor | None:
    """The mask (B,P) of right-padded rows whose padding carries no loss: None on CUDA. Attention is causal, so no valid
    position sees what is behind it, and without a mask transformers takes torch's causal kernel, which is faster. CPUs
    keep the mask, and the last bits of older runs."""
    return None if mask.is_cuda else mask


def _forget_prompt_vectors(llm: LLM, _: Any) -> None:
    llm._prompt_vectors.clear()
