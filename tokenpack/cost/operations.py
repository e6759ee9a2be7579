"""Count the floating-point operations of one training step, padded and packed.

    forward  = 2 * (sum over Linear of in * out * tokens of its input)
             + 4 * (sum over attentions of heads * head_dim * query-key pairs)
    training = 3 * forward

A multiply-add counts as two operations. Attention has two products per query-key pair, queries by
keys and weights by values, hence the 4. The backward computes each product twice, once for the
input and once for the weight, hence the 3. All weights count as trained.

Pairs are full rectangles, ``rows * q * k`` when padded and the sum of ``q_i * k_i`` when packed,
also for causal attention. Both counts follow the same convention, so their ratio is the speed-up
that removing padding can give. Normalization, softmax, embeddings and the optimizer are not
counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..checks import IGNORE_INDEX

# Names of the projections and of the cross-attention in the model families.
_QUERY_NAMES = ("q", "q_proj", "query")
_KEY_VALUE_NAMES = {"k", "v", "k_proj", "v_proj", "key", "value"}
_CROSS_ATTENTION_NAMES = ("EncDecAttention", "encoder_attn", "crossattention")
_ADAPTED = ".base_layer"  # where PEFT keeps a projection that it adapts


@dataclass(frozen=True)
class ModelCost:
    """Multiply-adds of one forward pass, per token and per query-key pair.

    A decoder-only model has only decoder counts; the others are 0.

    Attributes:
        per_encoder_token: of the linear layers that see encoder tokens, including the key and
            value projections of cross-attention.
        per_decoder_token: of the linear layers that see decoder tokens, including the head.
        per_encoder_pair: of all self-attentions of the encoder.
        per_decoder_pair: of all self-attentions of the decoder.
        per_cross_pair: of all cross-attentions.
        attentions: number of attention layers of all kinds.
        biased_attentions: number of attention layers with a relative bias: all self-attentions of
            T5, none in models without such a bias.
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
    """Tokens, and query-key pairs per attention, that a model computes for a batch.

    Attributes:
        encoder_tokens: tokens on the encoder's side; 0 for a decoder-only model.
        decoder_tokens: tokens on the decoder's side.
        encoder_pairs: pairs of an encoder self-attention.
        decoder_pairs: pairs of a decoder self-attention.
        cross_pairs: pairs of a cross-attention.
        sequences: number of sequences.
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
    """Floating-point operations of one forward and backward pass.

    Attributes:
        linear: operations of the linear layers.
        attention: operations of attention, without its projections.
    """

    linear: int
    attention: int

    @property
    def total(self) -> int:
        """Linear layers and attention together."""
        return self.linear + self.attention


def count_operations(model: nn.Module, batch: Mapping[str, Tensor], *, packed: bool) -> Operations:
    """Floating-point operations of one forward and backward pass of ``model`` over ``batch``.

    Args:
        model: a transformers language model, encoder-decoder or decoder-only, all of whose weight
            matrices belong to ``nn.Linear`` or ``nn.Embedding``.
        batch: the model's inputs: ``input_ids`` ``(rows, columns)``; ``attention_mask`` of the same
            shape (if absent, every position holds a real token); and, for an encoder-decoder,
            ``labels`` ``(rows, decoder_columns)``.
        packed: whether to count only the real tokens, as a patched model computes them, or every
            slot of the padded batch.

    Returns:
        The operations of linear layers and of attention.

    Raises:
        ValueError: if the model has a weight matrix that cannot be counted, or ``batch`` lacks
            ``input_ids`` or ``labels``.
    """
    count = count_packed(model, batch) if packed else count_padded(model, batch)
    return training_operations(model_cost(model), count)


def training_operations(cost: ModelCost, count: BatchCount) -> Operations:
    """Floating-point operations of one forward and backward pass: 3 times those of the forward.

    Args:
        cost: of the model; see `model_cost`.
        count: of the batch; see `count_padded`, `count_packed` and `count_lengths`.

    Returns:
        The operations of linear layers and of attention.
    """
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


# ---------------------------------------------------------------------- cost per token and per pair


def model_cost(model: nn.Module) -> ModelCost:
    """Count multiply-adds per token and per query-key pair, from the model's ``nn.Linear`` modules.

    The key and value projections of cross-attention see encoder tokens. All other modules outside
    the encoder, including the head, see decoder tokens. Works on the meta device, so that a model
    of any size can be counted without memory for its weights.

    Args:
        model: a transformers language model, encoder-decoder or decoder-only, not patched. With
            PEFT's LoRA around it, the matrices of the adapters count too.

    Raises:
        ValueError: if a weight matrix belongs to neither ``nn.Linear`` nor ``nn.Embedding``, or the
            model has no attention with known names.
    """
    _check_countable(model)
    encoder_decoder = _is_encoder_decoder(model)
    tokens = {"encoder": 0, "decoder": 0}
    pairs = {"encoder": 0, "decoder": 0, "cross": 0}
    attentions = biased = 0
    has_bias = hasattr(getattr(model, "config", None), "relative_attention_num_buckets")
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        *parents, name = path.removesuffix(_ADAPTED).split(".")
        in_encoder = encoder_decoder and "encoder" in parents
        in_cross = any(parent in _CROSS_ATTENTION_NAMES for parent in parents)
        if name in _QUERY_NAMES:
            # Queries by keys, then weights by values: heads * head_dim multiply-adds each, which is
            # the width of the query projection.
            kind = "cross" if in_cross else "encoder" if in_encoder else "decoder"
            pairs[kind] += 2 * module.out_features
            attentions += 1
            biased += has_bias and not in_cross
        # Also the matrices of an adapter, which are children of the projection.
        projects_encoder = in_cross and not _KEY_VALUE_NAMES.isdisjoint([*parents, name])
        sees_encoder = in_encoder or projects_encoder
        tokens["encoder" if sees_encoder else "decoder"] += module.in_features * module.out_features
    if not any(pairs.values()):
        raise ValueError(
            f"model must have attention with a query projection, an nn.Linear named one of "
            f"{', '.join(_QUERY_NAMES)}, got {type(model).__name__} without one"
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


def _check_countable(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2:
                raise ValueError(
                    f"model must have its weight matrices in nn.Linear and nn.Embedding, got "
                    f"{path}.{name} of shape {tuple(parameter.shape)} in {type(module).__name__}"
                )


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


# ------------------------------------------------------------------ tokens and pairs of a batch


def count_padded(model: nn.Module, batch: Mapping[str, Tensor]) -> BatchCount:
    """Tokens and pairs of a padded batch, including padding.

    Args:
        model: decides whether ``labels`` go through a decoder; see `count_operations`.
        batch: the model's inputs; see `count_operations`.

    Raises:
        ValueError: if ``batch`` lacks ``input_ids`` or ``labels``.
    """
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

    A patched model keeps the positions where ``attention_mask`` is not zero, and on the decoder's
    side those up to the last label that is not -100. A -100 inside a row is computed, trailing ones
    are not. (The head may also skip a -100 inside a row. It is counted here, padded and packed.)

    Args:
        model: decides whether ``labels`` go through a decoder; see `count_operations`.
        batch: the model's inputs; see `count_operations`.

    Raises:
        ValueError: if ``batch`` lacks ``input_ids`` or ``labels``.
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
        encoder_lengths: tokens of each sequence on the encoder's side; ``None`` for a decoder-only
            model.
        decoder_lengths: tokens of each sequence on the decoder's side, in the same order.

    Raises:
        ValueError: if the two sides have different numbers of sequences.
    """
    if encoder_lengths is None:
        pairs = sum(n * n for n in decoder_lengths)
        return BatchCount(0, sum(decoder_lengths), 0, pairs, 0, len(decoder_lengths))
    if len(encoder_lengths) != len(decoder_lengths):
        raise ValueError(
            f"encoder_lengths and decoder_lengths must have the same length, got "
            f"{len(encoder_lengths)} and {len(decoder_lengths)} sequences"
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
    """Decoder tokens of each row: those up to its last label that is not -100.

    Args:
        labels: ``(rows, columns)`` int64, -100 where there is no target.

    Returns:
        ``(rows,)`` int64.
    """
    kept_from_the_end = (labels != IGNORE_INDEX).flip(1).cumsum(1) > 0
    return kept_from_the_end.sum(1)


def _input_ids(batch: Mapping[str, Tensor]) -> Tensor:
    if "input_ids" not in batch:
        raise ValueError(f"batch must have input_ids, got {sorted(batch)}")
    return batch["input_ids"]


def _labels(batch: Mapping[str, Tensor]) -> Tensor:
    if "labels" not in batch:
        raise ValueError(f"batch must have labels for an encoder-decoder, got {sorted(batch)}")
    return batch["labels"]
