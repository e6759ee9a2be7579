"""Norms, positions and attention of the decoder, on a stream of tokens.

All layers take hidden states ``(1, total_tokens, hidden_size)`` and a `Call`, which holds what is
the same for all layers of a forward: the layouts, the rotation or bias of the positions, the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from ...attention import layout_attention
from ...attention.graph import Layer, attention_in_graph
from ...kernels import repad, unpad
from ...kernels.attention import alibi_bias_table
from .configuration import DecoderConfig
from .inputs import PackedInputs


class Call:
    """What all layers of one forward share.

    A plain object, which FSDP's mixed precision does not look into: rotations stay in float32.

    Attributes:
        inputs: the batch.
        rotation: cos and signed sin, ``(1, 1, total_tokens, rotated)`` each, in float32. None
            without RoPE.
        bias: ``(heads, 2 * reach + 1)``, ALiBi by distance. None with other positions.
        memo: what attention plans once for all layers.
    """

    __slots__ = ("bias", "inputs", "memo", "rotation")

    def __init__(
        self, inputs: PackedInputs, rotation: tuple[Tensor, Tensor] | None, bias: Tensor | None
    ) -> None:
        self.inputs, self.rotation, self.bias = inputs, rotation, bias
        self.memo: dict[Any, Any] = {}


# ------------------------------------------------------------------------------------------- norms


def make_norm(config: DecoderConfig, size: int | None = None) -> nn.Module:
    """The norm that the configuration names."""
    size = config.hidden_size if size is None else size
    if config.norm_type == "layernorm":
        return nn.LayerNorm(size, eps=config.rms_norm_eps)
    return nn.RMSNorm(size, eps=config.rms_norm_eps)


# --------------------------------------------------------------------------------------- positions


class Float32Buffers(nn.Module):
    """A module whose buffers are moved with the model, but not cast to its dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is None or after is None or before.is_meta:
                continue
            if after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


class DecoderRotaryEmbedding(Float32Buffers):
    """cos and sin of RoPE (Su et al., 2021), with the RoPE types of transformers.

    The first half of sin has a minus sign, which `rotate` needs. Both are float32, whatever the
    model's dtype: in bfloat16, positions past 256 would collide.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        parameters: Any = config.rope_parameters
        self.rope_type = parameters["rope_type"]
        compute: Callable[..., tuple[Tensor, float]] = self.compute_default_rope_parameters
        if self.rope_type != "default":
            compute = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = compute(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: DecoderConfig, device: Any = None, **unused: Any
    ) -> tuple[Tensor, float]:
        """The frequencies, ``(rotated // 2,)`` float32, and the factor of cos and sin, 1."""
        parameters: Any = config.rope_parameters
        assert config.head_dim is not None
        rotated = int(config.head_dim * (parameters.get("partial_rotary_factor") or 1.0))
        exponent = torch.arange(0, rotated, 2, dtype=torch.float32, device=device) / rotated
        return parameters["rope_theta"] ** -exponent, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin ``(1, 1, total_tokens, rotated)`` of ``(1, total_tokens)`` positions."""
        with torch.autocast(hidden.device.type, enabled=False):
            frequencies = self.inv_freq.to(hidden.device, torch.float32)
            angles = position_ids[..., None].float() * frequencies
            cos, sin = angles.cos()[:, None], angles.sin()[:, None]
            cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
            return cos * self.attention_scaling, sin * self.attention_scaling


def rotate(hidden: Tensor, rotation: tuple[Tensor, Tensor], interleaved: bool = False) -> Tensor:
    """Rotate the first channels of each head, in float32 or better.

    Args:
        hidden: ``(1, heads, total_tokens, head_dim)``.
        rotation: cos and signed sin ``(1, 1, total_tokens, rotated)``.
        interleaved: pairs are neighbors, as in DeepSeek's checkpoints. Otherwise channel ``i`` is
            paired with channel ``i + rotated // 2``.
    """
    cos, sin = rotation
    rotated = cos.shape[-1]
    half = rotated // 2
    rest = hidden[..., rotated:]
    part = hidden[..., :rotated]
    if interleaved:
        cos, sin = cos[..., half:], sin[..., half:]
        even, odd = part[..., 0::2], part[..., 1::2]
        out = torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    else:
        out = part * cos
        if torch.compiler.is_compiling():
            # Inductor does not trace roll for sizes that depend on values.
            first, second = part.split(half, dim=-1)
            out = out + torch.cat((second, first), dim=-1) * sin
        elif out.dtype == part.dtype:
            out += part.roll(half, dims=-1).mul_(sin)  # in place: two tensors instead of four
        else:
            out += part.roll(half, dims=-1) * sin
    out = out.to(hidden.dtype)
    return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out


class SinusoidalPositions(nn.Module):
    """Sines and cosines of the position, added to embeddings (Vaswani et al., 2017)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size

    def forward(self, position_ids: Tensor) -> Tensor:
        """``(1, total_tokens)`` int64, to ``(1, total_tokens, hidden_size)`` float32."""
        pairs = torch.arange(0, self.hidden_size, 2, device=position_ids.device)
        angles = position_ids[..., None].float() * 10000.0 ** (-pairs.float() / self.hidden_size)
        # An odd hidden_size has one sine more than cosines.
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[
            ..., : self.hidden_size
        ]


def alibi_slopes(heads: int) -> list[float]:
    """The slope of each head (Press et al., 2022).

    ``2 ** (-8 * i / heads)`` for a power of two. For other numbers, the slopes of the next lower
    power of two come first, and every second slope of twice that power fills the rest.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    more = [2.0 ** (-4.0 * i / power) for i in range(1, 2 * (heads - power), 2)]
    return slopes + more


def alibi_bias(heads: int, longest: int, like: Tensor) -> Tensor:
    """``(heads, 2 * longest - 1)``: minus slope times distance, in float32 or better."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    slopes = torch.tensor(alibi_slopes(heads), dtype=dtype, device=like.device)
    return alibi_bias_table(slopes, longest - 1)


# --------------------------------------------------------------------------------------- attention


class DecoderAttention(nn.Module):
    """Attention with query, key and value heads: multi-head, grouped-query, multi-query."""

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        width, bias = config.num_attention_heads * self.head_dim, config.attention_bias
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor, call: Call) -> Tensor:
        query = _heads(self.q_proj(hidden), self.head_dim)
        key, value = self.k_proj(hidden), self.v_proj(hidden)
        if self._needs_copies(call):
            heads = self.config.num_attention_heads
            copies = 2 if heads % 2 == 0 else heads
            key, value = key.repeat(1, 1, copies), value.repeat(1, 1, copies)
        key, value = _heads(key, self.head_dim), _heads(value, self.head_dim)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        if call.rotation is not None:
            query, key = rotate(query, call.rotation), rotate(key, call.rotation)
        key, value = _with_cached(key, value, call, self.layer_idx)
        out = _attend(self, query, key, value, call, self.head_dim**-0.5)
        return self.o_proj(out.flatten(2))

    def _needs_copies(self, call: Call) -> bool:
        """Whether a graph needs a second copy of the key head, because of Inductor's strides."""
        config, is_new = self.config, call.inputs.cache is None
        several = config.num_attention_heads > 1
        return (
            torch.compiler.is_compiling() and config.num_key_value_heads == 1 and several and is_new
        )


class DecoderLatentAttention(nn.Module):
    """Multi-head latent attention with a decoupled rotated key (DeepSeek-V2, 2024).

    The cache holds the latents and the rotated key, which all heads share. Modules have
    DeepSeek-V3's names. Without RoPE, the shared key is used as it is.
    """

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        widths = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        nope, rope, self.v_width = (width or 0 for width in widths)
        self.rank = config.kv_lora_rank or 0
        self.nope, self.rope, self.width = nope, rope, nope + rope
        size, heads = config.hidden_size, config.num_attention_heads
        bias, eps = config.attention_bias, config.rms_norm_eps
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(size, heads * self.width, bias=False)
        else:
            self.q_a_proj = nn.Linear(size, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * self.width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(size, self.rank + rope, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(self.rank, eps=eps)
        self.kv_b_proj = nn.Linear(self.rank, heads * (nope + self.v_width), bias=False)
        self.o_proj = nn.Linear(heads * self.v_width, size, bias=bias)
        self.scaling = self.width**-0.5 * _yarn_factor(config) ** 2

    def forward(self, hidden: Tensor, call: Call) -> Tensor:
        if self.config.q_lora_rank is None:
            query = self.q_proj(hidden)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden)))
        query = _heads(query, self.width)
        latent, shared = self.kv_a_proj_with_mqa(hidden).split([self.rank, self.rope], dim=-1)
        latent, shared = self.kv_a_layernorm(latent)[:, None], shared[:, None]
        if call.rotation is not None:
            interleaved = self.config.rope_interleave
            shared = rotate(shared, call.rotation, interleaved)
            rotated = rotate(query[..., self.nope :], call.rotation, interleaved)
            query = torch.cat((query[..., : self.nope], rotated), dim=-1)
        latent, shared = _with_cached(latent, shared, call, self.layer_idx)
        # (1, 1, total_k, rank) -> (1, heads, total_k, nope + v_width)
        expanded = _heads(self.kv_b_proj(latent.squeeze(1)), self.nope + self.v_width)
        key, value = expanded.split([self.nope, self.v_width], dim=-1)
        key = torch.cat((key, shared.expand(-1, key.shape[1], -1, -1)), dim=-1)
        # Backends take one width: zeros add nothing to scores, and are cut off from the output.
        width = max(self.width, self.v_width)
        query, key, value = (
            nn.functional.pad(side, (0, width - side.shape[-1])) for side in (query, key, value)
        )
        out = _attend(self, query, key, value, call, self.scaling)
        return self.o_proj(out[..., : self.v_width].flatten(2))


def _yarn_factor(config: DecoderConfig) -> float:
    """DeepSeek's factor of the scores for YaRN with ``mscale_all_dim``, as a square root."""
    parameters: Any = config.rope_parameters or {}
    factor, scale = parameters.get("factor") or 1.0, parameters.get("mscale_all_dim") or 0.0
    if parameters.get("rope_type", "default") == "default" or factor <= 1.0:
        return 1.0
    if config.position_embedding_type != "rope":
        return 1.0
    return 0.1 * scale * math.log(factor) + 1.0


def _heads(states: Tensor, width: int) -> Tensor:
    """``(1, total, heads * width)`` -> ``(1, heads, total, width)``."""
    return states.unflatten(-1, (-1, width)).transpose(1, 2)


def _with_cached(key: Tensor, value: Tensor, call: Call, layer_idx: int) -> tuple[Tensor, Tensor]:
    """Put new keys and values into the cache, and return those of all tokens that are visible.

    Args:
        key, value: ``(1, heads, total_tokens, width)``; the widths may differ.
    """
    inputs = call.inputs
    if inputs.cache is None:
        return key, value
    assert inputs.rows is not None
    streams = [side.squeeze(0).transpose(0, 1) for side in (key, value)]
    padded = [side.transpose(1, 2) for side in repad(streams, inputs.rows)]
    held = inputs.cache.update(*padded, layer_idx)
    if inputs.keys is inputs.layout:  # the cache was empty
        return key, value
    held = unpad([side.transpose(1, 2) for side in held], inputs.keys)
    key, value = (side.transpose(0, 1)[None] for side in held)
    return key, value


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float
) -> Tensor:
    """``(1, heads, total, width)`` each, to ``(1, total_q, heads, width)``."""
    config: DecoderConfig = module.config
    inputs = call.inputs
    dropout = config.attention_dropout if module.training else 0.0
    layer = Layer(True, scale, config.sliding_window, None, call.bias, float(dropout or 0.0))
    layouts, role = {"self": inputs.layout}, "self"
    if inputs.keys is not inputs.layout:
        layouts, role = {"dec": inputs.layout, "enc": inputs.keys}, "cross"
    backend = config.attention_backend
    # Inductor (torch 2.13) fails at the stride of a single head.
    if torch.compiler.is_compiling() and query.shape[1] > 1:
        return attention_in_graph(query, key, value, layouts, role, layer, backend)[0]
    return _attend_outside_graph(query, key, value, layouts, role, layer, backend, call.memo)


# The choice of backend and its plan are host work, so they are not compiled.
@torch.compiler.disable
def _attend_outside_graph(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layouts: Any,
    role: str,
    layer: Layer,
    backend: str,
    memo: dict[Any, Any],
) -> Tensor:
    options: dict[str, Any] = layer._asdict()
    out, _ = layout_attention(
        query, key, value, layouts, role, **options, backend=backend, memo=memo
    )
    return out
