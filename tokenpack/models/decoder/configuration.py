"""The configuration of the decoder: one choice each of attention, feed-forward, norm and positions.

Fields have the names of Hugging Face configurations. `DecoderConfig.attribute_map` adds the short
names of other toolkits (``dim``, ``n_layers``, ``attn`` ...). Every rule is checked when the
configuration is made.
"""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from ...attention import require_known_backend
from .saved_code import AUTO_MAP, SavedCode

ATTENTION_TYPES = ("mha", "gqa", "mqa", "mla")
POSITION_TYPES = ("rope", "sinusoidal", "learned", "alibi", "none")
NORM_TYPES = ("rmsnorm", "layernorm")
EXPERT_TYPES = ("moe", "moe_shared", "moe_ec")

# The activation of each feed-forward, and whether the configuration may name another one.
ACTIVATIONS = {
    "ffn": ("gelu", True),
    "relu_ffn": ("relu", False),
    "glu": ("sigmoid", False),
    "reglu": ("relu", False),
    "geglu": ("gelu", True),
    "swiglu": ("silu", False),
    "moe": ("silu", True),
    "moe_shared": ("silu", True),
    "moe_ec": ("silu", True),
}
FFN_TYPES = tuple(ACTIVATIONS)


@strict
class DecoderConfig(SavedCode, PreTrainedConfig):
    """Configuration of `DecoderModel` and `DecoderForCausalLM`.

    Names in parentheses are accepted too. ``None`` means that the value follows from the others.

    Attributes:
        vocab_size: size of the vocabulary.
        hidden_size (dim): width of the residual stream.
        num_hidden_layers (n_layers): number of blocks.
        num_attention_heads (n_heads): number of query heads.
        num_key_value_heads (n_kv_heads): number of key and value heads.
        head_dim: width of a head; ``hidden_size // num_attention_heads`` by default. With ``"mla"``
            it is ``qk_rope_head_dim``, the part that RoPE rotates.
        max_position_embeddings (max_seq): the longest sequence that learned positions have a row
            for, and the trained length of RoPE types that scale. Other positions have no limit.
        attention_type (attn): ``"mha"``, ``"gqa"``, ``"mqa"`` or ``"mla"``. None follows from
            ``num_key_value_heads``. ``"flash"`` is accepted as ``"mha"``: it names a backend.
        position_embedding_type (pos_enc): ``"rope"``, ``"sinusoidal"``, ``"learned"``, ``"alibi"``
            or ``"none"``.
        norm_type (norm): ``"rmsnorm"`` or ``"layernorm"``.
        norm_position: ``"pre"``: ``x + f(norm(x))`` and a last norm; ``"post"``:
            ``norm(x + f(x))``.
        rms_norm_eps (eps): added to the variance in every norm.
        ffn_type (ffn): ``"ffn"``, ``"relu_ffn"``, ``"glu"``, ``"reglu"``, ``"geglu"``,
            ``"swiglu"``, ``"moe"``, ``"moe_shared"`` or ``"moe_ec"``.
        intermediate_size (hidden_dim): inner width of a feed-forward; ``4 * hidden_size``.
        hidden_act: activation. Only ``"ffn"``, ``"geglu"`` and experts accept another one than
            their own.
        attention_bias, mlp_bias: biases of the linear layers of attention and feed-forward.
        qk_norm: RMSNorm of each query and key head before positions are applied.
        sliding_window: how many tokens a token sees, itself included.
        attention_backend: ``"auto"`` or a name from `tokenpack.attention.BACKENDS`.
        kv_lora_rank (latent_dim), q_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, \
            rope_interleave: of ``"mla"``, as in DeepSeek-V3.
        rope_parameters: of RoPE, as in transformers: ``{"rope_type": ..., "rope_theta": ...}``.
        num_local_experts (n_experts, moe_n_routed): number of routed experts.
        num_experts_per_tok (top_k): experts per token.
        moe_intermediate_size: inner width of an expert; ``intermediate_size``.
        n_shared_experts (moe_n_shared): experts of ``"moe_shared"`` that see every token.
        norm_topk_prob: divide the weights of a token's experts by their sum. None: if a token has
            several experts. With one, the router would get no gradient.
        router_aux_loss_coef (moe_aux_weight): weight of the load-balancing loss.
        router_bias_update_rate: step of the bias that balances the experts without a loss, 0 for
            none. See `DecoderForCausalLM.update_router_bias`.
        expert_capacity_factor (moe_capacity): tokens per expert of ``"moe_ec"``, as a multiple of
            an even share.
        allow_noncausal_routing: required for ``"moe_ec"``, in which the routing of a token depends
            on later tokens of its sequence.
        token_choice_at_inference: let the tokens of ``"moe_ec"`` choose their experts in eval mode.
            Required by ``generate``.
        hidden_dropout (dropout), attention_dropout: probabilities. The latter is
            ``hidden_dropout`` by default.
        scale_embeddings: multiply embeddings by ``sqrt(hidden_size)``. None: with sinusoidal
            positions, as in Vaswani et al. (2017).
        tie_word_embeddings (tie_weights): share the weight of embedding and head.
        initializer_range: standard deviation of new weights. That of a head is smaller if the
            model is wide, so that the first loss is close to ``ln(vocab_size)``.
        use_cache: return a cache in eval mode.

    Raises:
        ValueError: when it is made, if values do not fit together.
    """

    model_type = "tokenpack_decoder"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map: ClassVar[dict[str, str]] = {
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "max_seq": "max_position_embeddings",
        "attn": "attention_type",
        "pos_enc": "position_embedding_type",
        "norm": "norm_type",
        "eps": "rms_norm_eps",
        "ffn": "ffn_type",
        "hidden_dim": "intermediate_size",
        "latent_dim": "kv_lora_rank",
        "n_experts": "num_local_experts",
        "num_experts": "num_local_experts",
        "moe_n_shared": "n_shared_experts",
        "moe_aux_weight": "router_aux_loss_coef",
        "moe_capacity": "expert_capacity_factor",
        "dropout": "hidden_dropout",
        "tie_weights": "tie_word_embeddings",
    }

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    attention_type: str | None = None
    position_embedding_type: str = "rope"
    norm_type: str = "rmsnorm"
    norm_position: str = "pre"
    rms_norm_eps: float = 1e-6
    ffn_type: str = "swiglu"
    intermediate_size: int | None = None
    hidden_act: str | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    attention_backend: str = "auto"
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    rope_interleave: bool = False
    rope_parameters: RopeParameters | dict | None = None
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    n_shared_experts: int = 1
    norm_topk_prob: bool | None = None
    router_aux_loss_coef: float | int = 0.01
    router_bias_update_rate: float | int = 0.0
    expert_capacity_factor: float | int = 1.0
    allow_noncausal_routing: bool = False
    token_choice_at_inference: bool = False
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int | None = None
    scale_embeddings: bool | None = None
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._take_other_names(kwargs)
        self._complete_attention()
        self._complete_feed_forward()
        if self.attention_dropout is None:
            self.attention_dropout = self.hidden_dropout
        if self.scale_embeddings is None:
            self.scale_embeddings = self.position_embedding_type == "sinusoidal"
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)

    @property
    def has_experts(self) -> bool:
        """Whether the feed-forward is a mixture of experts."""
        return self.ffn_type in EXPERT_TYPES

    def _take_other_names(self, kwargs: dict[str, Any]) -> None:
        """Set the fields that are given under another name.

        transformers would set them after the values that follow from them, and would drop
        ``top_k``, which it takes for an option of ``generate``.
        """
        fields = type(self).__dataclass_fields__
        routed = kwargs.pop("moe_n_routed", None)
        names = {**type(self).attribute_map, "top_k": "num_experts_per_tok"}
        for name in [name for name in names if name in kwargs]:
            field, value = names[name], kwargs.pop(name)
            known = getattr(self, field)
            if known not in (fields[field].default, value):
                raise ValueError(
                    f"{name} and {field} are one setting, got {value!r} and {known!r}: leave one "
                    "out"
                )
            setattr(self, field, value)
        if routed is None:
            return
        total = self.num_local_experts
        both = routed + self.n_shared_experts
        if total not in (fields["num_local_experts"].default, routed, both):
            raise ValueError(
                f"n_experts must be moe_n_routed + moe_n_shared, {both}, or moe_n_routed, "
                f"{routed}, got {total}"
            )
        self.num_local_experts = routed

    def _complete_attention(self) -> None:
        heads = self.num_attention_heads
        if self.attention_type == "flash":
            self.attention_type = "mha"
        if self.attention_type is None:
            kinds = {None: "mha", heads: "mha", 1: "mqa"}
            self.attention_type = kinds.get(self.num_key_value_heads, "gqa")
        if self.num_key_value_heads is None:
            if self.attention_type == "gqa":
                raise ValueError("num_key_value_heads must be given for attention_type='gqa'")
            self.num_key_value_heads = 1 if self.attention_type == "mqa" else heads
        width = self.hidden_size // max(heads, 1)
        if self.head_dim is None and self.hidden_size % max(heads, 1):
            raise ValueError(
                "hidden_size must be divisible by num_attention_heads if head_dim is not given, "
                f"got {self.hidden_size} and {heads}"
            )
        if self.attention_type == "mla":
            width = width if self.head_dim is None else self.head_dim
            self.kv_lora_rank = self.kv_lora_rank or max(self.hidden_size // 8, 1)
            if self.qk_rope_head_dim is None:
                self.qk_rope_head_dim = max(width // 4 * 2, 2)
            if self.qk_nope_head_dim is None:
                self.qk_nope_head_dim = width
            if self.v_head_dim is None:
                self.v_head_dim = width
            self.head_dim = self.qk_rope_head_dim
        elif self.head_dim is None:
            self.head_dim = width

    def _complete_feed_forward(self) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.norm_topk_prob is None:
            self.norm_topk_prob = self.num_experts_per_tok > 1
        if self.hidden_act is None and self.ffn_type in ACTIVATIONS:
            self.hidden_act = ACTIVATIONS[self.ffn_type][0]

    # ------------------------------------------------------------------------------- validation

    def validate_architecture(self) -> None:
        """Check that the values fit together. `strict` calls it."""
        _one_of("attention_type", self.attention_type, ATTENTION_TYPES)
        _one_of("position_embedding_type", self.position_embedding_type, POSITION_TYPES)
        _one_of("norm_type", self.norm_type, NORM_TYPES)
        _one_of("norm_position", self.norm_position, ("pre", "post"))
        _one_of("ffn_type", self.ffn_type, FFN_TYPES)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            _at_least(name, getattr(self, name), 1)
        for name in ("max_position_embeddings", "intermediate_size", "sliding_window"):
            _at_least(name, getattr(self, name), 1)
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")
        if not (self.rms_norm_eps > 0.0 and self.initializer_range > 0.0):
            raise ValueError(
                "rms_norm_eps and initializer_range must be positive, got "
                f"{self.rms_norm_eps} and {self.initializer_range}"
            )
        require_known_backend(self.attention_backend)
        self._validate_attention()
        self._validate_feed_forward()

    def _validate_attention(self) -> None:
        heads, kind = self.num_attention_heads, self.attention_type or ""
        kv_heads = self.num_key_value_heads or 0
        _at_least("num_key_value_heads", kv_heads, 1)
        if heads % kv_heads:
            raise ValueError(
                "num_attention_heads must be divisible by num_key_value_heads, "
                f"got {heads} and {kv_heads}"
            )
        expected = {"mqa": 1, "gqa": kv_heads}.get(kind, heads)
        if kv_heads != expected:
            raise ValueError(
                f"num_key_value_heads must be {expected} for attention_type={kind!r}, got "
                f"{kv_heads}: use attention_type='gqa', or leave one of them out"
            )
        widths = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
        if kind == "mla":
            for name in (*widths, "q_lora_rank"):
                _at_least(name, getattr(self, name), 1)
            if self.qk_norm:
                raise ValueError("qk_norm must be False for attention_type='mla': latents have one")
        else:
            given = [name for name in (*widths, "q_lora_rank") if getattr(self, name) is not None]
            if given or self.rope_interleave:
                name = (given or ["rope_interleave"])[0]
                shown = "kv_lora_rank (latent_dim)" if name == "kv_lora_rank" else name
                raise ValueError(
                    f"{shown} belongs to attention_type='mla', got attention_type={kind!r}: leave "
                    "it out"
                )
        _at_least("head_dim", self.head_dim, 1)
        if self.position_embedding_type == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {self.head_dim}")

    def _validate_feed_forward(self) -> None:
        own, free = ACTIVATIONS[self.ffn_type]
        if self.hidden_act != own and not free:
            raise ValueError(
                f"hidden_act must be {own!r} for ffn_type={self.ffn_type!r}, "
                f"got {self.hidden_act!r}"
            )
        if not self.has_experts:
            return
        for name in ("num_local_experts", "num_experts_per_tok", "moe_intermediate_size"):
            _at_least(name, getattr(self, name), 1)
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok must be at most num_local_experts, "
                f"{self.num_local_experts}, got {self.num_experts_per_tok}"
            )
        if self.mlp_bias:
            raise ValueError("mlp_bias must be False for experts, which have no biases")
        if self.ffn_type == "moe_shared":
            _at_least("n_shared_experts", self.n_shared_experts, 1)
        if min(self.router_aux_loss_coef, self.router_bias_update_rate) < 0.0:
            raise ValueError(
                "router_aux_loss_coef and router_bias_update_rate must not be negative, got "
                f"{self.router_aux_loss_coef} and {self.router_bias_update_rate}"
            )
        if self.ffn_type != "moe_ec":
            return
        if not self.expert_capacity_factor > 0.0:
            raise ValueError(
                f"expert_capacity_factor must be positive, got {self.expert_capacity_factor}"
            )
        if not self.allow_noncausal_routing:
            raise ValueError(
                "allow_noncausal_routing must be True for ffn_type='moe_ec': experts choose among "
                "all tokens of a sequence, so the loss of a token depends on later tokens, which "
                "are unknown in generation. Use ffn_type='moe' if this is not intended"
            )
        if self.router_bias_update_rate:
            raise ValueError("router_bias_update_rate must be 0 for ffn_type='moe_ec'")


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {known}, got {value!r}")


def _at_least(name: str, value: int | None, minimum: int) -> None:
    if value is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
