"""One block of the decoder: attention, and a feed-forward or a mixture of experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration import DecoderConfig
from .gate import gated
from .inputs import PackedInputs
from .layers import Call, DecoderAttention, DecoderLatentAttention, make_norm
from .routing import DecoderRouter, balance_loss, choices_per_expert, choose_tokens


class DecoderMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` without a gate."""

    def __init__(self, config: DecoderConfig, width: int | None = None) -> None:
        super().__init__()
        size, bias = config.hidden_size, config.mlp_bias
        width = config.intermediate_size if width is None else width
        assert width is not None
        self.has_gate = config.ffn_type not in ("ffn", "relu_ffn")
        if self.has_gate:
            self.gate_proj = nn.Linear(size, width, bias=bias)
        self.up_proj = nn.Linear(size, width, bias=bias)
        self.down_proj = nn.Linear(width, size, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        if self.has_gate:
            return self.down_proj(gated(self.act_fn, self.gate_proj(hidden), self.up_proj(hidden)))
        return self.down_proj(self.act_fn(self.up_proj(hidden)))


class DecoderMoE(nn.Module):
    """A mixture of experts, with shared experts or expert choice if the configuration says so."""

    def __init__(self, config: DecoderConfig, experts: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.gate = DecoderRouter(config)
        self.experts = experts
        if config.ffn_type == "moe_shared":
            width = config.moe_intermediate_size
            assert width is not None
            self.shared_experts = DecoderMLP(config, width * config.n_shared_experts)

    def forward(
        self, hidden: Tensor, inputs: PackedInputs
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The output, and with token choice the balancing loss and the choices per expert."""
        config, flat = self.config, hidden.squeeze(0)
        probabilities = self.gate(flat)
        if config.ffn_type == "moe_ec" and (self.training or not config.token_choice_at_inference):
            return self._let_experts_choose(flat, probabilities, inputs)[None], None, None
        experts, weights = self.gate.choose(probabilities)
        out = self._run_experts(flat, experts, weights)[None]
        if config.ffn_type == "moe_shared":
            out = out + self.shared_experts(hidden)
        counted = inputs.counted()
        counts = choices_per_expert(experts, config.num_local_experts, counted)
        return out, balance_loss(probabilities, counts, counted), counts

    def _run_experts(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        # torch.nn.functional.grouped_mm has no float64.
        wide = hidden.dtype == torch.float64
        run = self.experts.one_by_one if wide else self.experts
        return run(hidden, experts, weights.to(hidden.dtype))

    def _let_experts_choose(
        self, flat: Tensor, probabilities: Tensor, inputs: PackedInputs
    ) -> Tensor:
        if inputs.cache is not None:
            raise ValueError(
                "use_cache must be False while experts choose tokens (ffn_type='moe_ec'): a cached "
                "token was routed without the tokens after it. Set token_choice_at_inference"
            )
        taken, weights = choose_tokens(
            probabilities, inputs, float(self.config.expert_capacity_factor)
        )
        token = taken.t().flatten()  # expert by expert
        expert = torch.arange(taken.shape[1], device=flat.device).repeat_interleave(taken.shape[0])
        part = self._run_experts(flat[token], expert[:, None], weights.t().flatten()[:, None])
        return torch.zeros_like(flat).index_add(0, token, part)


class DecoderLayer(GradientCheckpointingLayer):
    """One block. With pre-norm ``x + f(norm(x))``, with post-norm ``norm(x + f(x))``."""

    def __init__(self, config: DecoderConfig, layer_idx: int, experts: nn.Module | None) -> None:
        super().__init__()
        self.is_pre_norm = config.norm_position == "pre"
        is_latent = config.attention_type == "mla"
        self.self_attn = (DecoderLatentAttention if is_latent else DecoderAttention)(
            config, layer_idx
        )
        self.mlp = DecoderMLP(config) if experts is None else DecoderMoE(config, experts)
        self.input_layernorm = make_norm(config)
        self.post_attention_layernorm = make_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden: Tensor, call: Call) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The hidden states, and what `DecoderMoE.forward` returns about its experts."""
        first, second = self.input_layernorm, self.post_attention_layernorm
        if self.is_pre_norm:
            hidden = hidden + self.dropout(self.self_attn(first(hidden), call))
            update, balance, counts = self._feed_forward(second(hidden), call)
            return hidden + self.dropout(update), balance, counts
        hidden = first(hidden + self.dropout(self.self_attn(hidden, call)))
        update, balance, counts = self._feed_forward(hidden, call)
        return second(hidden + self.dropout(update)), balance, counts

    def _feed_forward(
        self, hidden: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if isinstance(self.mlp, DecoderMoE):
            return self.mlp(hidden, call.inputs)
        return self.mlp(hidden), None, None
