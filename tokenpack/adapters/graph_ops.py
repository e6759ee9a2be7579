"""What a packed forward reads from the values of its batch, as ops in a graph of torch.compile.

The number of real tokens depends on the mask's values. While torch.compile traces a forward, each
op gives its outputs a size that is known when the graph runs. All layers then run on one size of
this kind, so a graph serves every batch.

Whether a batch can be packed may also depend on values. Outside a graph such a batch runs padded.
A graph cannot change its path, so the ops raise an error that names the reason. They also count
the call, because a graph that was traced once does not run Python again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention.layouts import (
    Rows,
    fake_rows,
    fake_stream,
    layout_of,
    new_size,
    outputs_of,
)
from ..kernels import (
    PackedLayout,
    layout_from_cu_seqlens,
    layout_from_lengths,
    layout_from_mask,
)
from ..kernels._ops import ON_HOST
from ..kernels.layout import require_padded_form
from ..kernels.tokens import count_labels
from ..segments import rounded_sequences
from .call import AfterHead, state_of

_OUTSIDE = "call the model outside torch.compile, which runs such a batch padded"


class Counted(NamedTuple):
    """What the last op of a call that packs adds to the statistics.

    Attributes:
        key: of the patched model's state. Empty if a later op counts the call.
        tokens: number of real tokens of the sides that earlier ops laid out.
        slots: number of slots of these sides.
    """

    key: str = ""
    tokens: int = 0
    slots: int = 0

    def after(self, layout: PackedLayout, slots: int, key: str) -> Counted:
        """What a later op counts, after a side with this layout and number of slots."""
        return Counted(key, self.tokens + layout.total_tokens, self.slots + slots)


class GraphSide(NamedTuple):
    """One side of a forward that is traced, and what its values must fulfill.

    Attributes:
        counted: what the op counts besides this side.
        no_holes: attention depends on distances, so the mask must not have holes.
        first_column: a pooler reads the first column, so it must be real in all rows.
        encoder: the ``cu_seqlens`` of the encoder, for a decoder. Rows that have a token in the
            decoder must have one in the encoder.
        dead: ``()``, how many tokens of a stream are dead, or None.
        dead_key: of the patched model's state, which does not count them as tokens.
    """

    counted: Counted
    no_holes: bool = False
    first_column: bool = False
    encoder: Tensor | None = None
    dead: Tensor | None = None
    dead_key: str = ""


def layout_in_graph(mask: Tensor, name: str, side: GraphSide) -> PackedLayout:
    """`layout_from_mask` of a ``(rows, columns)`` mask. ``name`` is the argument, for errors."""
    rows, columns = mask.shape
    outputs = torch.ops.tokenpack.pack_rows(
        mask, name, *side.counted, side.no_holes, side.first_column, side.encoder
    )
    return layout_of(outputs, (rows, columns))


def full_layout_in_graph(tokens: Tensor, side: GraphSide) -> PackedLayout:
    """The layout of ``(rows, columns, ...)`` tokens that are all real."""
    rows, columns = tokens.shape[:2]
    cu_seqlens, indices, position_ids = torch.ops.tokenpack.full_rows(tokens, *side.counted)
    return PackedLayout(
        cu_seqlens, indices, position_ids, indices.shape[0], columns, (rows, columns)
    )


def packed_layout_in_graph(cu_seqlens: Tensor, tokens: Tensor, side: GraphSide) -> PackedLayout:
    """`layout_from_cu_seqlens` of a ``(1, total_tokens, ...)`` stream."""
    cu_seqlens, indices, position_ids, longest = torch.ops.tokenpack.pack_boundaries(
        cu_seqlens,
        tokens,
        *side.counted,
        side.first_column,
        side.encoder,
        side.dead,
        side.dead_key,
    )
    shape = cu_seqlens.shape[0] - 1, longest.shape[0]
    return PackedLayout(cu_seqlens, indices, position_ids, tokens.shape[1], longest.shape[0], shape)


def targets_in_graph(labels: Tensor, layout: PackedLayout, counted: Counted) -> tuple[Tensor, int]:
    """The labels of the real tokens, ``(total_tokens,)``, and how many of them are not -100."""
    targets, valid = torch.ops.tokenpack.take_targets(labels, layout.indices, *counted)
    torch._check(valid.shape[0] <= targets.shape[0])
    return targets, valid.shape[0]


def dead_tokens_in_graph(layout: PackedLayout, multiple: int, key: str) -> tuple[Tensor, int]:
    """The `filled_boundaries` of a stream, and its number of dead tokens, which ``key`` counts."""
    cu_seqlens, dead = torch.ops.tokenpack.dead_tokens(
        layout.cu_seqlens, layout.total_tokens, multiple, key
    )
    return cu_seqlens, dead.shape[0]


def slots_in_graph(mask: Tensor, read: Tensor) -> Tensor:
    """The mask, checked: slot ``read[row]`` of each row must be real."""
    checked: Tensor = torch.ops.tokenpack.require_real_slots(mask, read)
    return checked


def loss_in_graph(loss: Tensor, after: AfterHead, raw: Tensor, final: Tensor) -> Tensor:
    """The loss, checked: ``after`` must be all that the model does to the logits of its head."""
    zero = torch.ops.tokenpack.require_plain_head(raw, final, *after)
    return loss + zero.to(loss.dtype)


def count_padded_in_graph(
    inputs: dict[str, Any], key: str, reason: str, model: nn.Module
) -> dict[str, Any]:
    """The arguments of a forward that runs padded, which is counted when the graph runs.

    One of the tensors passes through the op, so that no pass over the graph drops the op.
    """
    name = next((name for name, value in inputs.items() if isinstance(value, Tensor)), None)
    if name is None:
        return inputs  # the model raises its own error
    counted = torch.ops.tokenpack.count_padded(
        inputs[name], key, reason, type(model).__name__, model.training
    )
    return {**inputs, name: counted}


# -------------------------------------------------------------------------------------------- ops


@torch.library.custom_op("tokenpack::pack_rows", mutates_args=(), tags=ON_HOST)
def _pack_rows(
    mask: Tensor,
    name: str,
    key: str,
    tokens: int,
    slots: int,
    no_holes: bool,
    first_column: bool,
    encoder: Tensor | None,
) -> Rows:
    layout = layout_from_mask(mask)
    if layout.total_tokens == 0:
        raise ValueError(f"{name} must mark at least one real token, got none")
    if no_holes and has_holes(layout):
        raise ValueError(
            f"{name} must have no holes, because this model's attention depends on the number of "
            f"columns between tokens, got holes: {_OUTSIDE}"
        )
    _check_rows(layout, name, first_column, encoder)
    _count(key, tokens + layout.total_tokens, slots + mask.numel())
    return outputs_of(layout, mask)


@torch.library.custom_op("tokenpack::pack_boundaries", mutates_args=(), tags=ON_HOST)
def _pack_boundaries(
    cu_seqlens: Tensor,
    padded: Tensor,
    key: str,
    tokens: int,
    slots: int,
    first_column: bool,
    encoder: Tensor | None,
    dead: Tensor | None,
    dead_key: str,
) -> Rows:
    total = padded.shape[1]
    layout = layout_from_cu_seqlens(cu_seqlens, total, device=padded.device)
    _check_rows(layout, "cu_seqlens", first_column, encoder)
    _count(key, tokens + total, slots + total)
    state = state_of(dead_key)
    if dead is not None and state is not None:
        state.stats.discount(int(dead))
    return outputs_of(layout, padded)


def _check_rows(
    layout: PackedLayout, name: str, first_column: bool, encoder: Tensor | None
) -> None:
    require_padded_form(layout)
    if first_column and pads_first_column(layout):
        raise ValueError(
            f"{name} must have a token in the first column of each row, which a pooler reads, "
            f"got padding: {_OUTSIDE}"
        )
    if encoder is not None and bool(((encoder.diff() == 0) & (layout.lengths > 0)).any()):
        raise ValueError(
            f"{name} must have no decoder tokens in a row whose encoder side has none, got some: "
            f"{_OUTSIDE}"
        )


@torch.library.custom_op("tokenpack::full_rows", mutates_args=(), tags=ON_HOST)
def _full_rows(padded: Tensor, key: str, tokens: int, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = padded.shape[:2]
    layout = layout_from_lengths([columns] * rows, device=padded.device)
    require_padded_form(layout)
    _count(key, tokens + layout.total_tokens, slots + layout.total_tokens)
    return layout.cu_seqlens, layout.indices, layout.position_ids


@torch.library.custom_op("tokenpack::take_targets", mutates_args=(), tags=ON_HOST)
def _take_targets(
    labels: Tensor, indices: Tensor, key: str, tokens: int, slots: int
) -> tuple[Tensor, Tensor]:
    targets = labels.flatten().index_select(0, indices)
    num_labels, num_valid = count_labels(labels, targets).tolist()
    if num_labels != num_valid:
        raise ValueError(
            "labels must be -100 at padded positions (and, for a causal model, for the first token "
            f"after left padding), got {num_labels - num_valid} other labels there: {_OUTSIDE}"
        )
    _count(key, tokens, slots)
    return targets, labels.new_empty((num_valid, 0))


@torch.library.custom_op("tokenpack::dead_tokens", mutates_args=(), tags=ON_HOST)
def _dead_tokens(cu_seqlens: Tensor, total: int, multiple: int, key: str) -> tuple[Tensor, Tensor]:
    dead = -total % multiple
    state = state_of(key)
    if state is not None:
        state.stats.dead_tokens += dead
    return filled_boundaries(cu_seqlens, total + dead), cu_seqlens.new_empty((dead, 0))


def filled_boundaries(cu_seqlens: Tensor, total: int) -> Tensor:
    """The boundaries with a sequence that ends at ``total``, and empty ones after it."""
    num_seqs = cu_seqlens.numel() - 1
    return nn.functional.pad(cu_seqlens, (0, rounded_sequences(num_seqs) - num_seqs), value=total)


@torch.library.custom_op("tokenpack::require_real_slots", mutates_args=(), tags=ON_HOST)
def _require_real_slots(mask: Tensor, read: Tensor) -> Tensor:
    if pads_read_slots(mask, read):
        raise ValueError(
            "attention_mask must be 1 in the slots that the model's head reads, got 0: " + _OUTSIDE
        )
    return mask.clone()


@torch.library.custom_op("tokenpack::require_plain_head", mutates_args=(), tags=ON_HOST)
def _require_plain_head(
    raw: Tensor, final: Tensor, scale: float, softcap: float | None, bias: Tensor | None
) -> Tensor:
    if not logits_match(AfterHead(scale, softcap, bias), raw, final):
        raise RuntimeError(
            "the model changes its logits after the head in a way that tokenpack does not support: "
            "call patch_model(model, logits='always'), or call the model once before torch.compile"
        )
    return raw.new_zeros((), dtype=torch.float32)


@torch.library.custom_op("tokenpack::count_padded", mutates_args=(), tags=ON_HOST)
def _count_padded(values: Tensor, key: str, reason: str, model: str, training: bool) -> Tensor:
    state = state_of(key)
    if state is not None:
        state.count_padded(reason, model, training)
    return values.clone()


def _count(key: str, tokens: int, slots: int) -> None:
    state = state_of(key)
    if state is not None:
        state.stats.packed_calls += 1
        state.stats.packed_tokens += tokens
        state.stats.padded_tokens += slots


# ---------------------------------------------------------- checks of values, shared with `inputs`


def has_holes(layout: PackedLayout) -> bool:
    """Whether a row has padding between two real tokens."""
    if layout.total_tokens < 2:
        return False
    gap = layout.columns.diff() - layout.position_ids.diff()
    return bool((gap[layout.position_ids[1:] > 0] != 0).any())


def pads_first_column(layout: PackedLayout) -> bool:
    """Whether a row has padding in its first column."""
    starts = layout.cu_seqlens[:-1].clamp(max=layout.total_tokens - 1)
    return bool((layout.lengths == 0).any()) or bool((layout.columns[starts] != 0).any())


def pads_read_slots(mask: Tensor, read: Tensor) -> bool:
    """Whether the mask is 0 in column ``read[row]`` of some row."""
    rows = torch.arange(len(mask), device=mask.device)
    return bool((mask[rows, read.to(mask.device)] == 0).any())


def logits_match(after: AfterHead, raw: Tensor, final: Tensor) -> bool:
    """Whether ``after`` is all that the model does to the logits of its head."""
    if after.is_identity:
        return torch.equal(raw, final)
    tolerance = 1e-2 if final.dtype in (torch.float16, torch.bfloat16) else 1e-5
    return torch.allclose(after(raw).double(), final.double(), rtol=tolerance, atol=1e-6)


# ------------------------------------------------------------------------------- fakes for tracing


@_pack_rows.register_fake
def _(mask: Tensor, *options: Any) -> Rows:
    return fake_rows(mask)


@_pack_boundaries.register_fake
def _(cu_seqlens: Tensor, padded: Tensor, *options: Any) -> Rows:
    return fake_stream(cu_seqlens, padded, padded.shape[1])


@_full_rows.register_fake
def _(padded: Tensor, *counted: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = padded.shape[:2]
    cu_seqlens, indices, position_ids = (
        padded.new_empty(size, dtype=torch.int32)
        for size in (rows + 1, rows * columns, rows * columns)
    )
    return cu_seqlens, indices, position_ids


@_take_targets.register_fake
def _(labels: Tensor, indices: Tensor, *counted: Any) -> tuple[Tensor, Tensor]:
    return labels.new_empty(indices.shape[0]), labels.new_empty((new_size(), 0))


@_dead_tokens.register_fake
def _(cu_seqlens: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return cu_seqlens.new_empty(new_size()), cu_seqlens.new_empty((new_size(), 0))


@_require_real_slots.register_fake
def _(mask: Tensor, read: Tensor) -> Tensor:
    return torch.empty_like(mask)


@_require_plain_head.register_fake
def _(raw: Tensor, *others: Any) -> Tensor:
    return raw.new_zeros((), dtype=torch.float32)


@_count_padded.register_fake
def _(values: Tensor, *options: Any) -> Tensor:
    return values.clone()


_count_padded.register_autograd(lambda _, gradient: (gradient, None, None, None, None))
