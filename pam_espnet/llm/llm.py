"""The LLM that answers: any Hugging Face causal LM, frozen, with LoRA beside it.

It knows embeddings, masks and tokens; it knows nothing of audio, prompts' layout in a batch, beams or files of data.
No token is ever added to its vocabulary and its tokenizer is kept as it is.

B utterances, R rows (utterances or hypotheses), P positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pam_espnet.engine import stepping
from pam_espnet.engine.blocks import FusedLlama
from pam_espnet.engine.exits import ExitPolicy
from pam_espnet.engine.stepping import DecoderState
from pam_espnet.errors import ConfigError
from pam_espnet.llm.lora import add_lora, lora_off, lora_precision, set_lora_training
from pam_espnet.llm.pretrained import choose_dtype, hub_source, load_tokenizer
from pam_espnet.llm.prompt_layout import Placed, end_of_turn_id, layout

# Settings of models whose logits are more than final norm + output layer; exit_logits and loss would be wrong.
_SCALED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


class TokenLosses(NamedTuple):
    """Of every answer token of a batch."""

    nll: Tensor  # float32 (targets,), negative log-likelihood
    correct: Tensor  # bool (targets,), whether the most likely token was the target
    exit_nll: Tensor | None  # float32 (targets,), the same from an intermediate block


class LLMDecoder(nn.Module):
    """A frozen causal LLM with optional LoRA.

    Attributes:
        tokenizer: the model's own Hugging Face tokenizer.
        width: D, size of its embeddings.
        num_layers: transformer blocks.
        vocab_size: V, rows of its embedding matrix.
        eos_ids: tokens that end an answer, the chat template's end of turn first.
    """

    def __init__(
        self,
        lm: Any,
        tokenizer: Any,
        lora: Mapping[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        prompt_position: str = "prompt",
        system: str | None = "",
        fused_decoding: bool = True,
        int8_decoding: bool = False,
    ) -> None:
        """
        Args:
            lm: a transformers causal LM; it is frozen in place.
            tokenizer: its tokenizer, with a chat template.
            lora: options of ``decoder.lora.add_lora``, or None for a frozen LLM.
            gradient_checkpointing: recompute activations in the backward pass (less memory, more time).
            prompt_position: where the prompt vector is read: "prompt" (last token of the prompt text) or "template"
                (last token of the whole template).
            system: system prompt of every conversation; "" is an empty one, None the template's default.
            fused_decoding: let the search run a copy of the blocks with LoRA merged (``decoder.fused``) where the LLM
                is of that kind; False goes through transformers, slower and without the copy's memory.
            int8_decoding: round that copy's weights, and the output layer's as the search uses it, to 8 bits
                (``decoder.packed``); training and prompts know nothing of it.

        Raises:
            ConfigError: a value out of range, or an LLM whose logits are not final norm + output layer.
        """
        super().__init__()
        if int8_decoding and not fused_decoding:
            raise ConfigError("dtype int8: only fused decoding has it; remove llm_conf.fused_decoding: false")
        if prompt_position not in ("prompt", "template"):
            raise ConfigError(f"prompt_position must be 'prompt' or 'template', not {prompt_position!r}")
        scaled = [name for name in _SCALED_LOGITS if getattr(lm.config, name, None) not in (None, 1, 1.0)]
        if scaled:
            raise ConfigError(f"this LLM scales its logits ({', '.join(scaled)}), which is not supported yet")
        self.lm: Any = lm.requires_grad_(False)
        self.tokenizer = tokenizer
        self.prompt_position = prompt_position
        self.system = system
        self.gradient_checkpointing = gradient_checkpointing
        if lora is not None:
            add_lora(lm, lora)
        if gradient_checkpointing:
            lm.activation_checkpointing_enable({"use_reentrant": False})
        self.width: int = lm.get_input_embeddings().weight.size(1)
        self.num_layers: int = lm.config.num_hidden_layers
        self.vocab_size: int = lm.get_input_embeddings().weight.size(0)
        self.end_id = end_of_turn_id(tokenizer)
        self.eos_ids = _eos_ids(self.end_id, tokenizer, lm)
        self.fused_decoding = fused_decoding
        self.int8_decoding = int8_decoding
        self._fused: tuple[Any, FusedLlama | None] | None = None  # and what it was made from
        self._prompt_vectors: dict[str, Tensor] = {}
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
        **options: Any,
    ) -> LLMDecoder:
        """Load from a Hugging Face folder or id.

        Args:
            path_or_id: a folder (nothing is fetched), or an id such as "org/name".
            lora: as in the constructor.
            dtype: "float32", "bfloat16", or "auto": bfloat16 where the device (CUDA or CPU) computes it natively,
                else float32.
            attention: transformers' attention implementation ("sdpa", "eager", "flash_attention_2"), or "auto":
                "sdpa", but "eager" for bfloat16 on a CPU, where the fused kernel's backward pass is slower.
            revision: commit, branch or tag of an id.
            local_files_only: for an id: use the local Hugging Face cache only.
            chat_template: a Jinja text or file, in place of the tokenizer's own.
            options: further options of the constructor.

        Raises:
            ConfigError: no such folder or id, or a value out of range.
        """
        from transformers import AutoModelForCausalLM

        chosen = choose_dtype(dtype)
        if attention == "auto":
            attention = "eager" if chosen == torch.bfloat16 and not torch.cuda.is_available() else "sdpa"
        source = hub_source(path_or_id, revision, local_files_only)
        tokenizer = load_tokenizer(path_or_id, revision, local_files_only, chat_template)

        try:
            lm = AutoModelForCausalLM.from_pretrained(path_or_id, dtype=chosen, attn_implementation=attention, **source)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"cannot load the LLM {path_or_id!r}: {error}") from error
        return cls(lm, tokenizer, lora=lora, **options)

    # ---- module behaviour -------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> LLMDecoder:
        """Training mode switches on LoRA's dropout alone; the frozen LLM's dropout stays off."""
        super().train(mode)
        self.lm.eval()
        set_lora_training(self.lm, mode)
        if self.gradient_checkpointing:
            for layer in self.transformer.layers:
                layer.training = mode  # the flag by which transformers decides to checkpoint; not recursive
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> LLMDecoder:
        """Devices change, dtypes do not: a trainer's ``model.to(dtype)`` must not blow a bfloat16 LLM up."""
        self._prompt_vectors.clear()  # they live on the old device
        self._fused = None
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

    # ---- the pieces of a forward pass -------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) -> input embeddings (...,D)."""
        return self.lm.get_input_embeddings()(ids)

    def forward(self, embeds: Tensor, mask: Tensor, positions: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm.

        Args:
            embeds: (B,P,D), right-padded, any floating dtype.
            mask: (B,P) bool, False on padding.
            positions: (B,P) positions, by default 0..P-1 in every row.

        Returns:
            (B,P,D) in the LLM's dtype; rows at padding are meaningless.
        """
        return self._outputs(embeds, mask, positions).last_hidden_state

    def _outputs(self, embeds: Tensor, mask: Tensor, positions: Tensor | None = None, **options: Any) -> Any:
        if positions is None:
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

    def token_losses(self, placed: Placed, exit_layer: int | None = None) -> TokenLosses:
        """Negative log-likelihood of each answer token; logits are computed only where there is a target.

        Args:
            placed: the batch.
            exit_layer: a block (from 1) whose output is to name the tokens too, through the shared final norm and
                output layer.
        """
        outputs = self._outputs(placed.embeds, placed.mask, output_hidden_states=exit_layer is not None)
        logits = self.logits(outputs.last_hidden_state.flatten(0, 1)[placed.target_index])  # (targets,V)
        nll = F.cross_entropy(logits, placed.target_ids, reduction="none")
        correct = logits.detach().argmax(-1) == placed.target_ids
        if exit_layer is None:
            return TokenLosses(nll, correct, None)
        hidden = outputs.hidden_states[exit_layer].flatten(0, 1)[placed.target_index]
        exit_nll = F.cross_entropy(self.exit_logits(hidden), placed.target_ids, reduction="none")
        return TokenLosses(nll, correct, exit_nll)

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

    # ---- stepping, for the search -----------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, prefix: Tensor, lengths: Tensor) -> tuple[Tensor, DecoderState]:
        """Run the prefix of every utterance once.

        Args:
            prefix: (B,P,D) embeddings, right-padded.
            lengths: (B,) valid positions, at least 1.

        Returns:
            float32 logits (B,V) of the first answer token, and the state for ``step``.
        """
        hidden, state = self.prefill_hidden(prefix, lengths)
        return self.search_logits(hidden), state

    @torch.no_grad()
    def prefill_hidden(
        self, prefix: Tensor, lengths: Tensor, policy: ExitPolicy | None = None
    ) -> tuple[Tensor, DecoderState]:
        """``prefill`` without the output layer: last hidden states after the final norm (B,D).

        With a ``policy`` the state's steps may leave before the last block; fused blocks only.
        """
        fused = self.fused_blocks()
        return stepping.prefill(self.lm, fused, prefix.to(self.dtype), lengths, policy)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """Append one token to every row; ``state`` is updated in place.

        Args:
            tokens: (R,) ids.
            state: of the same R rows.

        Returns:
            float32 logits (R,V) of the next token.
        """
        return self.search_logits(state.step(self.embed(tokens)))

    @torch.no_grad()
    def search_logits(self, hidden: Tensor) -> Tensor:
        """``logits`` (R,V) of rows (R,D), through the output layer that ``prefill`` packed where it did."""
        fused = None if self._fused is None else self._fused[1]
        return self.logits(hidden) if fused is None else fused.logits(hidden)

    @property
    def precision(self) -> str:
        """What decoding multiplies with: the LLM's dtype, or int8."""
        return "int8" if self.int8_decoding else str(self.dtype).removeprefix("torch.")

    def fused_blocks(self) -> FusedLlama | None:
        """The LLM as the search runs it, made anew when a weight has changed; None where transformers must do it.

        Raises:
            ConfigError: ``int8_decoding`` of an LLM that transformers must run.
        """
        if not self.fused_decoding:
            return None
        if self._fused is None or self._fused[0] != self._made_from():
            self._fused = None  # frees the old copy before the new one is made
            fused = stepping.fuse(self.lm, self.int8_decoding)
            self._fused = (self._made_from(), fused)
        if self.int8_decoding and self._fused[1] is None:
            raise ConfigError(f"dtype int8: {type(self.lm).__name__} has blocks that cannot be fused; use float32")
        return self._fused[1]

    def _made_from(self) -> Any:
        """What fused blocks depend on. Optimizers and load_state_dict raise a tensor's version; a write to ``.data``
        does not, but moves the storage."""
        weights = [(weight.data_ptr(), weight._version) for weight in self.lm.parameters()]
        return weights, self.int8_decoding


def _forget_prompt_vectors(decoder: LLMDecoder, _: Any) -> None:
    decoder._prompt_vectors.clear()


def _eos_ids(end_id: int, tokenizer: Any, lm: Any) -> tuple[int, ...]:
    """End of turn, then the EOS tokens that the tokenizer and the model name."""
    named = lm.generation_config.eos_token_id if lm.generation_config is not None else None
    named = named if isinstance(named, list) else [named]
    return tuple(dict.fromkeys(int(token) for token in [end_id, tokenizer.eos_token_id, *named] if token is not None))
