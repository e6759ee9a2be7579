"""The allow-list of model families, by `config.model_type`.

`tests/adapters/test_equivalence.py` shows that each family gives the same results packed as padded.
The code that all families share is in `forward.py`. An entry here states only how its family
differs, with functions from the family's own file.
"""

from __future__ import annotations

import re

from transformers import __version__ as transformers_version

from . import encoder_decoder, pooler, roberta, t5, umt5
from .family import Family, Positions
from .swap import Replacement


def _t5_like(name: str, attention: str, forward: Replacement, since: str | None = None) -> Family:
    return Family(
        name,
        "encoder_decoder",
        swaps={attention: forward},
        has_relative_bias=True,
        embeds_match_ids=True,
        minimum_transformers=since,
    )


def _bart_like(
    name: str,
    prefix: str,
    embedding: str,
    lookup: Replacement,
    positions: Positions | None = None,
    embeds_match_ids: bool = True,
    labels_end_cache: bool = True,
) -> Family:
    return Family(
        name,
        "encoder_decoder",
        swaps={f"{prefix}{embedding}": lookup},
        positions=positions,
        embeds_match_ids=embeds_match_ids,
        labels_end_cache=labels_end_cache,
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
        labels_end_cache=False,
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
        embeds_match_ids=False,
    ),
    "pegasus": _bart_like(
        "Pegasus",
        "Pegasus",
        "SinusoidalPositionalEmbedding",
        lookup=encoder_decoder.sinusoidal_positions_forward,
        embeds_match_ids=False,
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

# Families that compute wrong results on packed input. Patching one is an error, `strict` or not.
REFUSED: dict[str, str] = {
    "longt5": "its attention does not go through transformers' attention interface",
    "bloom": "its ALiBi is built from the padded mask, outside the attention interface",
    "mpt": "its ALiBi is built outside the attention interface",
    "falcon": "its attention does not go through transformers' attention interface",
    "gpt_oss": "packed attention does not support its attention sinks",
    "switch_transformers": "its capacity routing counts padding tokens",
    "mamba": "a state-space model carries its state across packed sequences",
    "mamba2": "a state-space model carries its state across packed sequences",
    "jamba": "a state-space hybrid carries its state across packed sequences",
}


def find_family(model_type: str) -> Family | None:
    """The family of a ``config.model_type``, or None if it is unknown.

    Raises:
        ValueError: if the family is in `REFUSED`, or transformers is too old for it.
    """
    if model_type in REFUSED:
        raise ValueError(f"{model_type} cannot be patched: {REFUSED[model_type]}")
    family = FAMILIES.get(model_type)
    oldest = None if family is None else family.minimum_transformers
    if oldest is not None and _numbers(transformers_version) < _numbers(oldest):
        raise ValueError(
            f"{model_type} needs transformers >= {oldest}, because earlier versions compute wrong "
            f"results, got {transformers_version}"
        )
    return family


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
