"""The decoder: a transformers model that runs on packed tokens.

    embedding -> blocks of attention and feed-forward -> head

Every batch becomes one stream of real tokens where it enters (`inputs`). Layers see the stream
alone, so padding costs nothing, and a sequence gets the same values in every batch. Outputs go back
to the shape of the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeCausalLMOutputWithPast
from transformers.utils import logging

from .blocks import DecoderLayer
from .configuration import DecoderConfig
from .head import DecoderHead, loss_of_logits, share_of_step
from .inputs import PackedInputs, pack_batch
from .layers import Call, DecoderRotaryEmbedding, SinusoidalPositions, alibi_bias, make_norm
from .routing import DecoderRouter
from .saved_code import SavedCode

logger = logging.get_logger(__name__)

# ---------------------------------------------------------------------------------------- experts


# transformers reads the source of the file that defines a model to learn whether its experts can be
# dispatched, so this class is in the file of the model.
@use_experts_implementation
class DecoderExperts(nn.Module):
    """The weights of all experts, each a gated feed-forward."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, size = config.moe_intermediate_size, config.hidden_size
        assert width is not None
        self.num_experts = config.num_local_experts
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, size, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``(total_tokens, hidden_size)``, ``(total_tokens, k)`` twice, to the weighted sum."""
        return self.one_by_one(hidden, top_k_index, top_k_weights)

    def one_by_one(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`forward` expert by expert: the implementation ``"eager"``."""
        out = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            token, place = (top_k_index == expert).nonzero(as_tuple=True)
            gate_up = nn.functional.linear(hidden[token], self.gate_up_proj[expert])
            gate, up = gate_up.chunk(2, dim=-1)
            part = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            part = part * top_k_weights[token, place, None]
            out.index_add_(0, token, part.to(out.dtype))
        return out


# ------------------------------------------------------------------------------------------- model


@dataclass
class DecoderModelOutput(BaseModelOutputWithPast):
    """Hidden states, cache, and the mean balancing loss of the layers."""

    balance: Tensor | None = None


class DecoderPreTrainedModel(SavedCode, PreTrainedModel):
    """What both models share: initialization, and what transformers needs to know."""

    config: DecoderConfig
    config_class = DecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    packs_itself = True  # `patch_model` and the trainers ask
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        config, std = self.config, self.config.initializer_range
        tied = config.tie_word_embeddings
        if isinstance(module, DecoderRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.has_bias:
                init.zeros_(module.e_score_correction_bias)
                init.zeros_(module.tokens_per_expert)
        elif isinstance(module, DecoderExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, (DecoderTokenEmbedding, DecoderHead)):
            if tied:
                # A token's own logit is up to std * hidden_size, if blocks add little to it.
                std = min(std, 2.0 / config.hidden_size)
            elif isinstance(module, DecoderHead):
                # Logits have a variance of std ** 2 * hidden_size. Half of it adds to the loss.
                std = min(std, 0.4 * config.hidden_size**-0.5)
            init.normal_(module.weight, mean=0.0, std=std)


class DecoderTokenEmbedding(nn.Embedding):
    """The embedding of tokens. A class of its own, because its weights may be tied to the head."""


class DecoderModel(DecoderPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        size, positions = config.hidden_size, config.position_embedding_type
        self.embed_tokens = DecoderTokenEmbedding(config.vocab_size, size)
        if positions == "learned":
            self.embed_positions: nn.Module = nn.Embedding(config.max_position_embeddings, size)
        elif positions == "sinusoidal":
            self.embed_positions = SinusoidalPositions(size)
        elif positions == "rope":
            self.rotary_emb = DecoderRotaryEmbedding(config)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer_idx, DecoderExperts(config) if config.has_experts else None)
            for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = make_norm(config) if config.norm_position == "pre" else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        packed: PackedInputs | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states in the shape of the batch, 0 at padding. `DecoderForCausalLM` calls it with
        ``packed``, a batch that is a stream already, and gets a stream.

        Arguments are those of `DecoderForCausalLM.forward`, without labels.
        """
        is_outer = packed is None
        if packed is None:
            packed = self.pack(
                input_ids,
                inputs_embeds,
                past_key_values,
                use_cache,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **kwargs,
            )
        hidden, every, balance = self._run(packed, bool(output_hidden_states))
        if is_outer:
            hidden = packed.in_rows(hidden)
        outputs = DecoderModelOutput(
            last_hidden_state=hidden,
            past_key_values=packed.cache,
            hidden_states=tuple(map(packed.in_rows, every)) if output_hidden_states else None,
            balance=balance,
        )
        return outputs if _returns_dict(self.config, return_dict) else outputs.to_tuple()

    def pack(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        past_key_values: Any,
        use_cache: bool | None,
        labels: Tensor | None = None,
        cu_seqlens: Any = None,
        cu_seqlens_padded: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **others: Any,
    ) -> PackedInputs:
        """The batch as a stream, with a cache if one is given or wanted."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("one of input_ids and inputs_embeds must be given, got both or none")
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        assert tokens is not None
        flattened = others.pop("cu_seq_lens_q", None)  # transformers' name
        if cu_seqlens is None and flattened is not None:
            cu_seqlens = flattened.flatten()
        unknown = sorted(name for name, value in others.items() if _matters(name, value))
        if unknown:
            packed = "seq_lengths" in unknown  # of rows that torch's collate function stacked
            hint = "; packed rows need data_collator=collate_packed_rows" if packed else ""
            raise TypeError(f"forward does not support the argument {unknown[0]!r}{hint}")
        if use_cache is None:
            may_split = position_ids is not None and attention_mask is None
            needs_none = labels is not None or cu_seqlens is not None or may_split
            use_cache = self.config.use_cache and not (self.training or needs_none)
            use_cache = use_cache and not self._experts_choose()
        if use_cache and self.training and self.gradient_checkpointing:
            logger.warning_once("use_cache=True is ignored with gradient checkpointing")
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        _check_cache(past_key_values)
        return pack_batch(
            *(tokens, attention_mask, position_ids, labels),
            *(cu_seqlens, cu_seqlens_padded, past_key_values),
        )

    def _experts_choose(self) -> bool:
        config = self.config
        return config.ffn_type == "moe_ec" and not config.token_choice_at_inference

    def _run(
        self, packed: PackedInputs, keep_states: bool
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """The last hidden states, those before each block, and the balancing loss."""
        hidden = packed.tokens if packed.tokens.dim() == 3 else self.embed_tokens(packed.tokens)
        hidden, call = self._with_positions(hidden, packed)
        hidden = self.dropout(hidden)
        states, losses = [], []
        for layer in self.layers:
            if keep_states:
                states.append(hidden)
            hidden, balance, counts = layer(hidden, call)
            if balance is not None:
                losses.append(balance)
            if counts is not None and self.training and layer.mlp.gate.has_bias:
                layer.mlp.gate.count(counts)
        hidden = self.norm(hidden)
        states.append(hidden)
        return hidden, states, torch.stack(losses).mean() if losses else None

    def _with_positions(self, hidden: Tensor, packed: PackedInputs) -> tuple[Tensor, Call]:
        config, positions = self.config, packed.position_ids
        kind = config.position_embedding_type
        if config.scale_embeddings:
            hidden = hidden * math.sqrt(config.hidden_size)
        if kind == "learned":
            longest, limit = packed.keys.max_seqlen, config.max_position_embeddings
            if not torch.compiler.is_compiling() and longest > limit:
                raise ValueError(
                    f"input_ids must have at most max_position_embeddings = {limit} tokens per "
                    f"sequence with learned positions, got {longest}"
                )
            hidden = hidden + self.embed_positions(positions)
        elif kind == "sinusoidal":
            hidden = hidden + self.embed_positions(positions).to(hidden.dtype)
        rotation = self.rotary_emb(hidden, positions) if kind == "rope" else None
        bias = None
        if kind == "alibi":
            bias = alibi_bias(config.num_attention_heads, packed.keys.max_seqlen, hidden)
        return hidden, Call(packed, rotation, bias)


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):
    """The decoder with an LM head, for training and generation."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = DecoderModel(config)
        self.lm_head: nn.Module = DecoderHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_padded: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model on padded rows, a packed stream, or packed rows.

        Args:
            input_ids: ``(rows, columns)`` int64; ``(1, total_tokens)`` with ``cu_seqlens``.
            attention_mask: ``(rows, columns)``, 1 for real tokens. Padding may be anywhere and is
                not computed. A sequence is the real tokens of a row in their order.
            position_ids: ``(rows, columns)``. Default: the number of real tokens before each token
                in its sequence. Without a mask and a cache, positions that do not count up begin a
                new sequence. ALiBi does not read them.
            past_key_values: a ``DynamicCache`` of earlier calls.
            inputs_embeds: ``(rows, columns, hidden_size)``, in place of ``input_ids``.
            labels: ``(rows, columns)`` int64, -100 for tokens without a loss. Token t predicts the
                label of the next token of its sequence.
            use_cache: return a cache. Default: in eval mode without labels.
            cu_seqlens: ``(num_seqs + 1,)`` int32, boundaries of packed sequences.
            cu_seqlens_padded: ``(num_seqs + 1,)`` int32, where each sequence begins in flattened
                packed rows.
            output_hidden_states: return the states before each block and the last ones.
            logits_to_keep: compute logits of the last columns alone, or of these columns. 0: all.
            num_items_in_batch: denominator of the loss. Default: the number of targets.
            return_logits: compute logits. Default: except in training with labels.

        Returns:
            ``loss``: the cross entropy, and in training the weighted balancing loss of experts.
            ``aux_loss``: the balancing loss, with labels or in training. ``logits``: in the shape
            of the batch, 0 at padding. ``past_key_values`` and ``hidden_states``. Fields that do
            not apply are None.

        Raises:
            ValueError: if arguments contradict each other, or labels are not -100 at padding.
            TypeError: if an argument is not supported.
        """
        packed = self.model.pack(
            *(input_ids, inputs_embeds, past_key_values, use_cache, labels),
            *(cu_seqlens, cu_seqlens_padded, attention_mask, position_ids),
            **kwargs,
        )
        outputs = self.model(
            packed=packed, output_hidden_states=output_hidden_states, return_dict=True
        )
        targets = packed.targets
        if return_logits is None:
            return_logits = targets is None or not self.training
        head = self._head_with_logits if return_logits else self._head_without_logits
        loss, logits = head(outputs.last_hidden_state, packed, logits_to_keep, num_items_in_batch)
        if loss is not None and outputs.balance is not None and self.training:
            # Micro-batches of one step add up to the mean over their tokens, as the loss does.
            share = share_of_step(targets, num_items_in_batch, loss)
            loss = loss + self.config.router_aux_loss_coef * share * outputs.balance
        result = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=outputs.balance if self.training or loss is not None else None,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return result if _returns_dict(self.config, return_dict) else result.to_tuple()

    def _head_with_logits(
        self, hidden: Tensor, packed: PackedInputs, keep: int | Tensor, num_items: Any
    ) -> tuple[Tensor | None, Tensor]:
        """The loss, if there are labels, and the logits in the shape of the batch."""
        keeps_all = isinstance(keep, int) and keep == 0
        if packed.targets is None and not keeps_all:
            columns = slice(-keep, None) if isinstance(keep, int) else keep
            return None, self.lm_head(packed.in_rows(hidden)[:, columns])
        if not keeps_all:
            raise ValueError(f"logits_to_keep must be 0 with labels, got {keep}")
        logits = self.lm_head(hidden)
        loss = None
        if packed.targets is not None:
            loss = loss_of_logits(logits, packed.targets, num_items)
        return loss, packed.in_rows(logits)

    def _head_without_logits(
        self, hidden: Tensor, packed: PackedInputs, keep: int | Tensor, num_items: Any
    ) -> tuple[Tensor | None, None]:
        """The loss, fused with the head unless an adapter wraps or replaces it."""
        targets = packed.targets
        if targets is None:
            return None, None
        if isinstance(self.lm_head, DecoderHead):
            return self.lm_head(hidden, targets, num_items), None
        return loss_of_logits(self.lm_head(hidden), targets, num_items), None

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate``. Prompts must be padded on the left.

        Raises:
            ValueError: if experts choose tokens, or a prompt ends in padding.
        """
        config = self.config
        if config.ffn_type == "moe_ec" and (self.training or not config.token_choice_at_inference):
            raise ValueError(
                "token_choice_at_inference must be True to generate with ffn_type='moe_ec', and "
                "the model in eval mode: experts would choose among tokens that do not exist yet"
            )
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and not bool((mask[:, -1] != 0).all()):
            raise ValueError("attention_mask must be 1 in the last column: pad on the left")
        return super().generate(inputs, *args, **kwargs)

    def update_router_bias(self) -> None:
        """Balance the experts by the choices since the last call, once after each optimizer step.

        `RouterBiasCallback` does it in a ``Trainer``. Counts are summed over all ranks.

        Raises:
            ValueError: if ``router_bias_update_rate`` is 0.
        """
        rate = self.config.router_bias_update_rate
        if not (self.config.has_experts and rate > 0.0):
            raise ValueError(
                f"router_bias_update_rate must be positive and experts be in use, got {rate} and "
                f"ffn_type={self.config.ffn_type!r}"
            )
        spread = torch.distributed.is_available() and torch.distributed.is_initialized()
        for layer in self.model.layers:
            layer.mlp.gate.update_bias(rate, torch.distributed.all_reduce if spread else None)


def _returns_dict(config: DecoderConfig, return_dict: bool | None) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)


# What collators and `generate` pass, and what this model reads from the boundaries instead.
_NOT_NEEDED = frozenset(
    ("max_seqlen", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "cache_position")
)


def _matters(name: str, value: Any) -> bool:
    """Whether an argument would change the result. False switches an output off."""
    return name not in _NOT_NEEDED and value is not None and value is not False


def _check_cache(cache: Any) -> None:
    if cache is not None and getattr(cache, "is_compileable", False):
        raise ValueError(
            f"past_key_values must be a DynamicCache, got a {type(cache).__name__}, whose length "
            "is not that of its tokens"
        )
