"""The models of the commands and benchmarks: those to train, and the published shapes to count.

All are built from configs, with random weights or on the meta device. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from ..samples import examples
from ..samples.examples import ExampleSet
from ..samples.text import Text
from ..samples.tokenizer import BOS, EOS, PAD, token_id

# --------------------------------------------------------------------------------- models to train


@dataclass(frozen=True)
class ModelSize:
    """Dimensions of a model to train.

    Attributes:
        kv_heads: key and value heads of Llama. The other families have ``heads`` of them.
        layers: layers of the decoder, and of the encoder if there is one.
        max_length: the longest input, in tokens.
    """

    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    layers: int
    vocab_size: int
    max_length: int


class SpecialIds(NamedTuple):
    """Ids of the special tokens."""

    pad: int
    eos: int
    bos: int


def build_t5(
    size: ModelSize,
    ids: SpecialIds,
    config_class: type[T5Config] = T5Config,
    model_class: type[PreTrainedModel] = T5ForConditionalGeneration,
) -> PreTrainedModel:
    """A T5 with random weights and without dropout, or a model of a family with the same config."""
    config = config_class(
        d_model=size.d_model,
        d_kv=size.d_model // size.heads,
        d_ff=size.d_ff,
        num_heads=size.heads,
        num_layers=size.layers,
        dropout_rate=0.0,
        decoder_start_token_id=ids.pad,
        **_common_options(size, ids),
    )
    return model_class(config)


def build_nllb(size: ModelSize, ids: SpecialIds) -> PreTrainedModel:
    """An NLLB (M2M100) with random weights, without dropout and layer drop."""
    config = M2M100Config(
        d_model=size.d_model,
        encoder_ffn_dim=size.d_ff,
        decoder_ffn_dim=size.d_ff,
        encoder_attention_heads=size.heads,
        decoder_attention_heads=size.heads,
        encoder_layers=size.layers,
        decoder_layers=size.layers,
        max_position_embeddings=size.max_length,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        decoder_start_token_id=ids.eos,
        **_common_options(size, ids),
    )
    return M2M100ForConditionalGeneration(config)


def build_llama(size: ModelSize, ids: SpecialIds) -> PreTrainedModel:
    """A Llama with random weights and without dropout."""
    config = LlamaConfig(
        hidden_size=size.d_model,
        # Its MLP has three matrices, T5's has two. Two thirds of the width give as many weights.
        intermediate_size=size.d_ff * 2 // 3 // 32 * 32,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        num_hidden_layers=size.layers,
        max_position_embeddings=size.max_length,
        attention_dropout=0.0,
        **_common_options(size, ids),
    )
    return LlamaForCausalLM(config)


def _common_options(size: ModelSize, ids: SpecialIds) -> dict[str, Any]:
    return {
        "vocab_size": size.vocab_size,
        "pad_token_id": ids.pad,
        "eos_token_id": ids.eos,
        "bos_token_id": ids.bos,
        "use_cache": False,  # training needs no cache, and building one slows the padded run
        "attn_implementation": "sdpa",
    }


# ---------------------------------------------------------------------------------------- the demo


@dataclass(frozen=True)
class DemoSize(ModelSize):
    """Dimensions of the demo's models, and of their batches.

    Attributes:
        vocab_size: upper limit of the tokenizer's vocabulary.
        batch_size: rows of an encoder-decoder's batch. A causal LM has two thirds of it: its rows
            form one stream of tokens instead of two, so fewer rows give matrix products of the same
            height.
        max_label_length: the longest labels of an encoder-decoder, in tokens.
    """

    batch_size: int
    max_label_length: int


SIZES = {
    "tiny": DemoSize(32, 64, 2, 1, 1, 512, 64, 6, 32),
    # For two CPU cores and a few minutes. Wide and shallow: the cost per sequence and layer is
    # small compared with the matrix products, as in a model of practical size.
    "small": DemoSize(512, 3072, 8, 4, 2, 4096, 256, 24, 64),
    # For a data center GPU.
    "large": DemoSize(1024, 4096, 16, 8, 12, 8192, 1024, 96, 256),
}


@dataclass(frozen=True)
class DemoModel:
    """A model of the demo: how to build it, and how to make its examples from texts."""

    title: str
    task: str
    build_family: Callable[[ModelSize, SpecialIds], PreTrainedModel]
    make_examples: Callable[[Sequence[Text], Tokenizer, DemoSize, int], ExampleSet]
    batch_size: Callable[[DemoSize], int] = lambda size: size.batch_size

    def build(self, size: DemoSize, tokenizer: Tokenizer) -> PreTrainedModel:
        """The model, with the vocabulary and the special ids of ``tokenizer``."""
        size = replace(size, vocab_size=tokenizer.get_vocab_size())
        ids = SpecialIds(*(token_id(tokenizer, token) for token in (PAD, EOS, BOS)))
        return self.build_family(size, ids)


DEMO_MODELS = {
    "t5": DemoModel(
        "T5",
        "span corruption",
        build_t5,
        lambda texts, tokenizer, size, seed: examples.span_corruption_examples(
            texts, tokenizer, size.max_length, size.max_label_length, seed
        ),
    ),
    "nllb": DemoModel(
        "NLLB",
        "body -> summary",
        build_nllb,
        lambda texts, tokenizer, size, seed: examples.pair_examples(
            texts, tokenizer, size.max_length, size.max_label_length
        ),
    ),
    "llama": DemoModel(
        "Llama",
        "causal",
        build_llama,
        lambda texts, tokenizer, size, seed: examples.causal_examples(
            texts, tokenizer, size.max_length
        ),
        batch_size=lambda size: size.batch_size * 2 // 3,
    ),
}

# ----------------------------------------------------------------------- published shapes, to count


def _t5(d_model: int, d_ff: int, heads: int, layers: int) -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(d_model=d_model, d_ff=d_ff, num_heads=heads, num_layers=layers)
    )


def _nllb_600m() -> PreTrainedModel:
    return M2M100ForConditionalGeneration(M2M100Config(vocab_size=256_206))


def _llama(hidden: int, intermediate: int, layers: int) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128_256,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=8,
        )
    )


SHAPES: dict[str, Callable[[], PreTrainedModel]] = {
    "t5-small": lambda: _t5(512, 2048, 8, 6),
    "t5-base": lambda: _t5(768, 3072, 12, 12),
    "t5-large": lambda: _t5(1024, 4096, 16, 24),
    "nllb-600m": _nllb_600m,
    "llama-1b": lambda: _llama(2048, 8192, 16),
    "llama-8b": lambda: _llama(4096, 14336, 32),
}


def build_shape(name: str) -> PreTrainedModel:
    """A model of a published shape on the meta device, without weights.

    Raises:
        ValueError: if there is no shape of that name.
    """
    if name not in SHAPES:
        raise ValueError(f"--shape must be one of {', '.join(SHAPES)}, got {name!r}")
    with torch.device("meta"):
        return SHAPES[name]()


def build_config(name_or_path: str) -> PreTrainedModel:
    """The language model of a config, on the meta device.

    Args:
        name_or_path: a ``config.json``, a folder that holds one, or a name on the Hugging Face hub.

    Raises:
        ValueError: if there is no such config, or transformers has no language model for it.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model-config must be a config.json, its folder or a name on the hub, got "
            f"{name_or_path}: {error}"
        ) from None
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return auto_class.from_config(config)
    except ValueError as error:
        raise ValueError(
            f"--model-config must be the config of a language model, got {name_or_path}: {error}"
        ) from None
