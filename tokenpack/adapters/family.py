"""What tokenpack knows of the model families: an allow-list, and what is special about each.

A family is on the list because `tests/adapters/test_equivalence.py` shows that it gives the same
numbers packed as padded. What all share is in `forward.py`; a family names here only what differs,
and the code for it is in the file beside this one that bears its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from . import encoder_decoder, pooler, roberta, t5, umt5
from .swap import Replacement

Positions = Callable[[Any, str, Tensor], Tensor]
Kind = Literal["encoder_decoder", "decoder", "encoder"]


@dataclass(frozen=True)
class Family:
    """How one family of models differs from the general mechanism.

    Attributes:
        name: what it is called in tables and messages.
        kind: which inputs it takes and how its labels are shifted.
        swaps: the forwards to replace, by class name.
        positions: computes ``(rows, columns)`` position ids from the model, a side (``"enc"``,
            ``"dec"`` or ``"self"``) and the padded ids, where a token's position is more than its
            column.
        biased_by_distance: attention counts columns between tokens, so that a mask with holes,
            which packing closes, would change it.
        embeds_alone: a stack does nothing to ids but call its own module, so that what that gives
            may be handed in for them. Marian and Pegasus scale it, if they were given ids.
        minimum_transformers: the oldest version whose own numbers are right.
    """

    name: str
    kind: Kind
    swaps: Mapping[str, Replacement] = field(default_factory=dict)
    positions: Positions | None = None
    biased_by_distance: bool = False
    embeds_alone: bool = False
    minimum_transformers: str | None = None


def _t5_like(name: str, attention: str, forward: Replacement, since: str | None = None) -> Family:
    return Family(
        name,
        "encoder_decoder",
        swaps={attention: forward},
        biased_by_distance=True,
        embeds_alone=True,
        minimum_transformers=since,
    )


def _bart_like(
    name: str,
    prefix: str,
    embedding: str,
    lookup: Replacement,
    positions: Positions | None = None,
    embeds_alone: bool = True,
) -> Family:
    return Family(
        name,
        "encoder_decoder",
        swaps={
            f"{prefix}Encoder": encoder_decoder.stack_forward,
            f"{prefix}Decoder": encoder_decoder.stack_forward,
            f"{prefix}{embedding}": lookup,
        },
        positions=positions,
        embeds_alone=embeds_alone,
    )


def _bert_like(name: str, pooling: str, positions: Positions | None = None) -> Family:
    return Family(name, "encoder", swaps={pooling: pooler.first_token_forward}, positions=positions)


# By `config.model_type`.
FAMILIES: dict[str, Family] = {
    "t5": _t5_like("T5, Flan-T5, ByT5", "T5Attention", t5.attention_forward),
    "mt5": _t5_like("mT5", "MT5Attention", t5.attention_forward),
    # Before 5.18 its decoder is not causal under SDPA.
    "umt5": _t5_like("UMT5", "UMT5Attention", umt5.attention_forward, since="5.18"),
    "m2m_100": _bart_like(
        "M2M100, NLLB",
        "M2M100",
        "SinusoidalPositionalEmbedding",
        lookup=encoder_decoder.m2m100_positions_forward,
        positions=encoder_decoder.m2m100_positions,
    ),
    "bart": _bart_like(
        "BART",
        "Bart",
        "LearnedPositionalEmbedding",
        lookup=encoder_decoder.learned_positions_forward,
    ),
    "mbart": _bart_like(
        "mBART",
        "MBart",
        "LearnedPositionalEmbedding",
        lookup=encoder_decoder.learned_positions_forward,
    ),
    "marian": _bart_like(
        "Marian",
        "Marian",
        "SinusoidalPositionalEmbedding",
        lookup=encoder_decoder.sinusoidal_positions_forward,
        embeds_alone=False,
    ),
    "pegasus": _bart_like(
        "Pegasus",
        "Pegasus",
        "SinusoidalPositionalEmbedding",
        lookup=encoder_decoder.sinusoidal_positions_forward,
        embeds_alone=False,
    ),
    "llama": Family("Llama", "decoder"),
    "mistral": Family("Mistral", "decoder"),
    "mixtral": Family("Mixtral", "decoder"),
    "qwen2": Family("Qwen2", "decoder"),
    "qwen3": Family("Qwen3", "decoder"),
    "qwen3_moe": Family("Qwen3-MoE", "decoder"),
    "gemma2": Family("Gemma2", "decoder"),
    "gemma3_text": Family("Gemma3", "decoder"),
    "phi3": Family("Phi3", "decoder"),
    "olmo2": Family("OLMo2", "decoder"),
    "granite": Family("Granite", "decoder"),
    "cohere": Family("Cohere", "decoder"),
    "gpt2": Family("GPT-2", "decoder"),
    "gpt_neox": Family("GPT-NeoX", "decoder"),
    "bert": _bert_like("BERT", "BertPooler"),
    "roberta": _bert_like("RoBERTa", "RobertaPooler", roberta.positions),
    "xlm-roberta": _bert_like("XLM-RoBERTa", "XLMRobertaPooler", roberta.positions),
    "modernbert": Family("ModernBERT", "encoder"),
}

# Known to compute something else on packed input: patching one is an error, `strict` or not.
REFUSED: dict[str, str] = {
    "longt5": "its attention does not go through transformers' attention interface",
    "bloom": "its ALiBi is built from the padded mask, outside the attention interface",
    "mpt": "its ALiBi is built outside the attention interface",
    "falcon": "its attention does not go through transformers' attention interface",
    "gpt_oss": "its attention sinks are a keyword that packed attention does not compute",
    "switch_transformers": "its capacity routing counts padding tokens",
    "mamba": "a state-space model carries its state across packed sequences",
    "mamba2": "a state-space model carries its state across packed sequences",
    "jamba": "a state-space hybrid carries its state across packed sequences",
}
