"""Count the floating-point operations of one training step, padded and packed.

    forward  = 2 * (sum over Linear of in * out * tokens it sees)
             + 4 * (sum over attentions of heads * head_dim * query-key pairs)
    training = 3 * forward

A multiply-add is two operations. An attention multiplies twice per query-key pair, queries by keys
and weights by values, hence the 4. The backward pass does each product twice, once for the input
and once for the weight, hence the 3; every weight is taken to be trained.

Pairs are full rectangles, ``rows * q * k`` when padded and the sum of ``q_i * k_i`` when packed,
causal or not: the same convention for both, so that the ratio of the two is what removing padding
can give and nothing else. Normalisation, softmax, embeddings and the optimizer are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..checks import IGNORE_INDEX

# What the families call their projections and their cross-attention.
_QUERY_NAMES = ("q", "q_proj", "query")
_KEY_VALUE_NAMES = ("k", "v", "k_proj", "v_proj", "key", "value")
_CROSS_ATTENTION_NAMES = ("EncDecAttention", "encoder_attn", "crossattention")


@dataclass(frozen=True)
class ModelCost:
    """Multiply-adds of one forward pass, per token and per query-key pair.

    A model with a single stream of tokens has everything under ``decoder``. ``attentions`` is how
    many layers of attention there are, of all kinds; ``biased_attentions`` how many have a relative
    bias, as T5's of a side to itself: none, or all but the cross-attentions.
    """

    per_encoder_token: int
    per_decoder_token: int
    per_encoder_pair: int
    per_decoder_pair: int
    per_cross_pair: int
    attentions: int = 0
    biased_attentions: int = 0


@dataclass(frozen=True)
class BatchCount:
    """How many tokens, and query-key pairs per attention, a batch puts through the model.

    ``sequences`` is how many of them there are.
    """

    encoder_tokens: int
    decoder_tokens: int
    encoder_pairs: int
    decoder_pairs: int
    cross_pairs: int
    sequences: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of both sides."""
        return self.encoder_tokens + self.decoder_tokens


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one forward and backward pass."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        """Linear layers and attention together."""
        return self.linear + self.attention


def count_operations(model: nn.Module, batch: Mapping[str, Tensor], *, packed: bool) -> Operations:
    """Floating-point operations of one forward and backward pass of ``model`` over ``batch``.

    Args:
        model: a transformers language model, encoder-decoder or decoder-only, whose weight matrices
            are all ``nn.Linear`` or ``nn.Embedding``.
        batch: what the model is called with. ``input_ids`` ``(rows, columns)``, ``attention_mask``
            of the same shape (absent: every position is real) and, for an encoder-decoder,
            ``labels`` ``(rows, decoder_columns)``.
        packed: whether to count the real tokens alone, as a patched model computes them, or every
            slot of the padded rectangle.

    Raises:
        ValueError: if the model has a weight matrix that cannot be counted, or ``batch`` lacks what
            is needed.
    """
    count = count_packed(model, batch) if packed else count_padded(model, batch)
    return training_operations(model_cost(model), count)


def training_operations(cost: ModelCost, count: BatchCount) -> Operations:
    """Floating-point operations of one forward and backward pass: 3 times the forward's."""
    linear = (
        cost.per_encoder_token * count.encoder_tokens
        + cost.per_decoder_token * count.decoder_tokens
    )
    attention = (
        cost.per_encoder_pair * count.encoder_pairs
        + cost.per_decoder_pair * count.decoder_pairs
        + cost.per_cross_pair * count.cross_pairs
    )
    return Operations(linear=3 * 2 * linear, attention=3 * 2 * attention)


# ----------------------------------------------------------------------- what a token costs a model


def model_cost(model: nn.Module) -> ModelCost:
    """Multiply-adds per token and per query-key pair, from the model's own Linear modules.

    The key and value projections of cross-attention see encoder tokens; whatever lies outside the
    encoder (the head too) sees decoder tokens. Works on the meta device, so a model of any size
    can be counted without memory for its weights.

    Raises:
        ValueError: if a weight matrix belongs to neither ``nn.Linear`` nor ``nn.Embedding``, or no
            attention is recognised.
    """
    _refuse_what_is_not_counted(model)
    encoder_decoder = _is_encoder_decoder(model)
    tokens = {"encoder": 0, "decoder": 0}
    pairs = {"encoder": 0, "decoder": 0, "cross": 0}
    attentions = biased = 0
    has_bias = hasattr(getattr(model, "config", None), "relative_attention_num_buckets")
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        *parents, name = path.split(".")
        in_encoder = encoder_decoder and "encoder" in parents
        in_cross = any(parent in _CROSS_ATTENTION_NAMES for parent in parents)
        if name in _QUERY_NAMES:
            # Queries times keys, then weights times values: heads * head_dim each, and that
            # product is the width of the query projection.
            kind = "cross" if in_cross else "encoder" if in_encoder else "decoder"
            pairs[kind] += 2 * module.out_features
            attentions += 1
            biased += has_bias and not in_cross
        sees_encoder = in_encoder or (in_cross and name in _KEY_VALUE_NAMES)
        tokens["encoder" if sees_encoder else "decoder"] += module.in_features * module.out_features
    if not any(pairs.values()):
        raise ValueError(
            f"model: no attention recognised in {type(model).__name__}; a query projection must be "
            f"an nn.Linear named one of {', '.join(_QUERY_NAMES)}"
        )
    return ModelCost(
        per_encoder_token=tokens["encoder"],
        per_decoder_token=tokens["decoder"],
        per_encoder_pair=pairs["encoder"],
        per_decoder_pair=pairs["decoder"],
        per_cross_pair=pairs["cross"],
        attentions=attentions,
        biased_attentions=biased,
    )


def _refuse_what_is_not_counted(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2:
                raise ValueError(
                    f"model: cannot count the operations of {path}.{name}, a weight of shape "
                    f"{tuple(parameter.shape)} in a {type(module).__name__}; "
                    f"only nn.Linear and nn.Embedding are counted"
                )


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


# -------------------------------------------------------------------- how many tokens a batch holds


def count_padded(model: nn.Module, batch: Mapping[str, Tensor]) -> BatchCount:
    """Tokens and pairs of the whole rectangle, padding included."""
    rows, columns = _input_ids(batch).shape
    if not _is_encoder_decoder(model):
        return BatchCount(0, rows * columns, 0, rows * columns**2, 0, rows)
    decoder_columns = _labels(batch).shape[1]
    return BatchCount(
        encoder_tokens=rows * columns,
        decoder_tokens=rows * decoder_columns,
        encoder_pairs=rows * columns**2,
        decoder_pairs=rows * decoder_columns**2,
        cross_pairs=rows * decoder_columns * columns,
        sequences=rows,
    )


def count_packed(model: nn.Module, batch: Mapping[str, Tensor]) -> BatchCount:
    """Tokens and pairs that a patched model computes.

    It keeps the positions where ``attention_mask`` is not zero, and those of the decoder up to the
    last label that is not -100: a -100 inside a row is computed, trailing ones are not. (In the
    head it may leave out those inside too; they are counted here, on both sides alike.)
    """
    mask = batch.get("attention_mask")
    input_ids = _input_ids(batch)
    lengths = input_ids.new_ones(input_ids.shape).sum(1) if mask is None else (mask != 0).sum(1)
    if not _is_encoder_decoder(model):
        return count_lengths(None, lengths.tolist())
    return count_lengths(lengths.tolist(), kept_label_lengths(_labels(batch)).tolist())


def count_lengths(encoder_lengths: list[int] | None, decoder_lengths: list[int]) -> BatchCount:
    """Tokens and pairs of sequences of these lengths, without padding.

    Args:
        encoder_lengths: tokens of each sequence on the encoder's side, ``None`` if there is none.
        decoder_lengths: tokens of each sequence on the decoder's side, in the same order.

    Raises:
        ValueError: if the two sides have different numbers of sequences.
    """
    if encoder_lengths is None:
        pairs = sum(n * n for n in decoder_lengths)
        return BatchCount(0, sum(decoder_lengths), 0, pairs, 0, len(decoder_lengths))
    if len(encoder_lengths) != len(decoder_lengths):
        raise ValueError(
            f"encoder_lengths and decoder_lengths: got {len(encoder_lengths)} and "
            f"{len(decoder_lengths)} sequences, they must be as many"
        )
    return BatchCount(
        encoder_tokens=sum(encoder_lengths),
        decoder_tokens=sum(decoder_lengths),
        encoder_pairs=sum(n * n for n in encoder_lengths),
        decoder_pairs=sum(n * n for n in decoder_lengths),
        cross_pairs=sum(m * n for m, n in zip(decoder_lengths, encoder_lengths)),
        sequences=len(decoder_lengths),
    )


def kept_label_lengths(labels: Tensor) -> Tensor:
    """``(rows,)`` int64: decoder tokens of each row, up to its last label that is not -100.

    Args:
        labels: ``(rows, columns)``, -100 where no loss is taken.
    """
    seen_from_the_end = (labels != IGNORE_INDEX).flip(1).cumsum(1) > 0
    return seen_from_the_end.sum(1)


def _input_ids(batch: Mapping[str, Tensor]) -> Tensor:
    if "input_ids" not in batch:
        raise ValueError(f"batch: needs input_ids, got {sorted(batch)}")
    return batch["input_ids"]


def _labels(batch: Mapping[str, Tensor]) -> Tensor:
    if "labels" not in batch:
        raise ValueError(f"batch: an encoder-decoder model needs labels, got {sorted(batch)}")
    return batch["labels"]
