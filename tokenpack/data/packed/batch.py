"""Packed batches for a causal model: a plan and its sequences, as tensors that keep them separate.

The fields of ``model(**batch)`` isolate the sequences in every way to run the model:

- A patched model (`patch_model`) reads ``cu_seqlens`` and ``cu_seqlens_padded``, and skips padding.
- An unpatched model with SDPA, eager or flex attention reads ``position_ids``, which restart at 0
  in every sequence. transformers derives the mask from them only if it gets no attention mask and
  keeps no cache. So the batch has no ``attention_mask`` field, and ``use_cache`` is False.
- An unpatched model with flash attention reads ``cu_seq_lens_q`` and related fields, because it
  derives boundaries from position ids only if the batch has a single row.

For an unpatched model, the padding after the last sequence of a row is a sequence of its own. So
every slot attends to at least one slot, and no softmax is empty.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...checks import IGNORE_INDEX, as_integer, at_least_one
from ...packing import Packer, PackResult
from ...segments import rounded_sequences
from ..row_layout import RowLayout
from ..tokens import Tokens, flatten_tokens, require_same_lengths
from .base import CUT_BY_ROWS, PackedFields, pad_rows, selected

_BY_TOKEN = ("input_ids", "labels", "position_ids")


class PackedBatch(PackedFields):
    """Rows of concatenated sequences, with the fields that keep the sequences separate.

    The batch is a mapping for ``model(**batch)``. On a patched model, and on most unpatched causal
    models, each sequence gets the logits that it would get in a batch of its own, and ``loss`` is
    that of the same sequences padded. An unpatched model must let transformers build its mask from
    position ids (Llama, Mistral, Qwen, Gemma and similar); `isolated_by` tests whether yours does.
    Encoders (BERT) and models that build their own masks or positions (OPT, BLOOM, Falcon, Mamba)
    ignore the boundaries unless they are patched. The batch is for forwards: ``generate`` does not
    accept these fields.

    Each field is also an attribute that can be read and set. ``to(device)`` and ``pin_memory()``
    return copies of the batch.

    Attributes:
        input_ids: ``(rows, capacity)`` int64.
        labels: ``(rows, capacity)`` int64. By default, for a loss that shifts the labels, as in
            Hugging Face models: not shifted, with -100 at padding and at the first token of every
            sequence, so that no token is predicted from another sequence. With
            ``labels_shifted=True``, for a loss that does not shift: each token has the label of the
            next one, and the last token of a sequence has -100. These labels are an attribute but
            not a field, because a model would shift them again.
        position_ids: ``(rows, capacity)`` int64, from 0 in every sequence and in a row's padding.
        cu_seqlens: ``(num_seqs + 1,)`` int32, boundaries of the sequences among the tokens of the
            batch, row after row, without padding.
        cu_seqlens_padded: ``(num_seqs + 1,)`` int32, the first slot of each sequence in the
            flattened rows, then the number of slots. Absent in a stream, which has no padding.
        max_seqlen: length of the longest sequence. With ``dead_tokens``, the next power of two.
        use_cache: False.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: ``cu_seqlens`` and ``max_seqlen``
            of the flattened rows, including padding, for transformers' own flash attention.
        dead_tokens: ``()`` int64 on the CPU, the number of slots that ``pad_to_total`` has added to
            a stream. They are one more sequence in ``cu_seqlens``, and empty sequences follow it.
            Absent in other batches.
        plan: the plan, which maps sequences to samples and lists the samples that were dropped or
            truncated. It is not a field, and it is None in a batch that was not made from a plan.
    """

    _host_fields = frozenset({"dead_tokens"})

    plan: PackResult | None = None

    def _check_boundaries(self) -> None:
        ids, starts = self.get("input_ids"), self.get("cu_seqlens_padded", self.get("cu_seqlens"))
        if not (isinstance(ids, Tensor) and isinstance(starts, Tensor) and starts.is_cpu):
            return
        if not len(starts) or int(starts[-1]) != ids.numel():
            raise ValueError(
                f"the boundaries of a packed batch must end at its {ids.numel()} slots, got "
                f"{int(starts[-1]) if len(starts) else 'none'}: a packed batch {CUT_BY_ROWS}"
            )

    @property
    def attention_mask(self) -> Tensor:
        """``(rows, capacity)`` int64, 1 at tokens and 0 at padding.

        It is not a field, because a model that gets a mask treats each row as one sequence.
        """
        rows, columns = self.input_ids.shape
        starts, lengths = self._starts(), self._ends().diff().long()
        steps = torch.zeros(rows * columns + 1, dtype=torch.int64, device=starts.device)
        one = torch.ones_like(starts)
        steps.index_add_(0, starts, one).index_add_(0, starts + lengths, -one)
        return steps[:-1].cumsum(0).view(rows, columns)

    @property
    def boundaries(self) -> list[Tensor]:
        """First and last column (exclusive) of the sequences: a ``(num_seqs, 2)`` int64 per row."""
        rows, columns = self.input_ids.shape
        starts, lengths = self._starts(), self._ends().diff().long()
        begins = starts % columns
        counts = torch.bincount(starts // columns, minlength=rows)
        return list(torch.stack([begins, begins + lengths], dim=1).split(counts.tolist()))

    @property
    def stream(self) -> PackedBatch:
        """The same sequences as one row of all tokens, without padding.

        A patched model computes on this form anyway, and flash attention works best with it. With
        SDPA or eager attention, an unpatched model needs memory quadratic in the length of the row.
        """
        tokens = self.attention_mask.flatten().nonzero()[:, 0]
        ends = self._ends()
        longest = int(ends.diff().max()) if "dead_tokens" in self else self.max_seqlen
        fields = _boundary_fields(ends, None, longest)
        stream = type(self)(self._gather(tokens) | fields)
        stream.plan = self.plan
        if "labels" in vars(self):  # shifted labels
            stream.labels = self.labels.flatten()[tokens][None]
        return stream

    def select(self, sequences: Any) -> PackedBatch:
        """Return some of the sequences, in the given order, as a `stream`.

        Args:
            sequences: ``(k,)`` integers from 0 to ``num_seqs - 1``, at least one, in any form, as
                in `pack_lengths`. A sequence may occur more than once.

        Raises:
            TypeError: if ``sequences`` are not integers.
            ValueError: if ``sequences`` is empty.
            IndexError: if an index is out of range.
        """
        boundaries = self._ends()
        numbers = torch.from_numpy(selected(sequences, len(boundaries) - 1))
        chosen = numbers.to(boundaries.device, non_blocking=True)
        lengths = boundaries.diff().long()[chosen]
        ends = lengths.cumsum(0)
        steps = torch.arange(int(ends[-1]), device=ends.device)
        slots = steps + (self._starts()[chosen] - ends + lengths).repeat_interleave(lengths)
        fields = self._gather(slots.to(self.input_ids.device))
        cu_seqlens = nn.functional.pad(ends, (1, 0)).to(torch.int32)
        return type(self)(fields | _boundary_fields(cu_seqlens, None, int(lengths.max())))

    def padded(self, pad_token_id: int) -> dict[str, Tensor]:
        """Return the same sequences as a padded batch, with one sequence per row.

        Returns:
            ``input_ids``, ``attention_mask`` and, if the batch has them, ``labels``, each of shape
            ``(num_seqs, max_seqlen)``.
        """
        stream = self.select(torch.arange(len(self._ends()) - 1))
        lengths = stream.cu_seqlens.cpu().diff()
        rows, mask = pad_rows(stream.input_ids[0], lengths, pad_token_id)
        batch = {"input_ids": rows, "attention_mask": mask.long()}
        if "labels" in stream:
            batch["labels"], _ = pad_rows(stream.labels[0], lengths, IGNORE_INDEX)
        return batch

    @staticmethod
    def isolated_by(model: nn.Module) -> bool:
        """Test whether ``model(**batch)`` keeps sequences separate, in the model's current state.

        The test runs two small forwards in evaluation mode. They differ in the first sequence and
        in the second row. The logits of the other sequence in the first row must not change.
        """
        device = next(model.parameters()).device
        plan = Packer(8, "nf").pack([3, 4, 6])

        def logits(first: list[int], last: list[int]) -> Tensor:
            batch = pack_result_to_tensors(plan, [first, [1, 0, 1, 1], last], device=device)
            del batch["labels"]
            outputs = model(**batch)
            if not isinstance(outputs, tuple):
                outputs = tuple(outputs.values())
            if not outputs:
                raise ValueError("model gives no outputs to compare (patched with logits='never'?)")
            return outputs[0][0]

        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with torch.no_grad():
                one, other = logits([1, 0, 0], [1] * 6), logits([0, 1, 1], [0] * 6)
        finally:
            for module in training:  # modules that were in evaluation mode stay in it
                module.training = True
        one, other = one[3:7], other[3:7]
        # Both forwards run the same kernels on the same shapes, so rounding rarely differs.
        tolerance = 4 * torch.finfo(one.dtype).eps * one.abs().max()
        return bool((one - other).abs().max() <= tolerance)

    def _starts(self) -> Tensor:
        """Return the first slot of each sequence, ``(num_seqs,)`` int64."""
        slots = self.get("cu_seqlens_padded")
        return (self._ends() if slots is None else slots)[:-1].long()

    def _ends(self) -> Tensor:
        """Return the boundaries without those of dead tokens, ``(num_seqs + 1,)`` int32."""
        cu_seqlens: Tensor = self.cu_seqlens
        if "dead_tokens" not in self:
            return cu_seqlens
        real = self.input_ids.numel() - int(self.dead_tokens)  # no sequence is empty
        return cu_seqlens[: int((cu_seqlens < real).sum()) + 1]

    def _gather(self, slots: Tensor) -> dict[str, Any]:
        """Return the per-token fields at some slots, as one row."""
        return {name: self[name].flatten()[slots][None] for name in _BY_TOKEN if name in self}


def pack_result_to_tensors(
    result: PackResult,
    token_ids: Any,
    labels: Any = None,
    padding_value: int = 0,
    label_padding_value: int = IGNORE_INDEX,
    device: torch.device | str | None = None,
    *,
    labels_shifted: bool = False,
    stream: bool = False,
    pad_to_total: int | None = None,
) -> PackedBatch:
    """Build the batch that a plan describes: one row per bin.

    Args:
        result: the plan, made for the lengths of ``token_ids``.
        token_ids: the sequences, as in `pack_dataset`.
        labels: labels of the same lengths, not shifted, in any form too. By default, ``token_ids``.
        padding_value: the value of ``input_ids`` at padding.
        label_padding_value: the value of ``labels`` where the loss ignores them. Hugging Face
            losses ignore only -100, so use another value only with a loss of your own.
        device: the device of the batch. By default, the CPU.
        labels_shifted: give each token the label of the next one, for a loss that does not shift;
            see `PackedBatch`.
        stream: return one row of all tokens without padding, instead of one row per bin.
        pad_to_total: with ``stream``, fill the row up to a multiple of this number, and
            ``cu_seqlens`` up to a power of two of sequences, at least 64. Batches of a token budget
            then have constant shapes. The dead tokens are a sequence of their own, have
            ``label_padding_value`` as labels, and are counted in ``batch.dead_tokens``.

    Returns:
        The batch, with its sequences in the order of the plan.

    Raises:
        TypeError: if ids, labels or padding values are not integers.
        ValueError: if the lengths of ids or labels differ from the plan, or a sequence is empty; or
            ``pad_to_total`` is below 1 or given without ``stream``.
    """
    check_pad_to_total(pad_to_total, stream)
    fill = as_integer("padding_value", padding_value)
    label_fill = as_integer("label_padding_value", label_padding_value)
    empty = bool(len(result.dropped))  # dropped sequences may be empty
    ids = flatten_tokens(token_ids, "token_ids", empty=empty)
    label_tokens = None if labels is None else flatten_tokens(labels, "labels", empty=True)
    if label_tokens is not None:
        require_same_lengths(ids, "token_ids", label_tokens, "labels")
    batch = build_batch(
        result, ids, label_tokens, fill, label_fill, "token_ids", labels_shifted, stream
    )
    if pad_to_total is not None:
        batch = with_dead_tokens(batch, pad_to_total, fill, label_fill)
    return batch if device is None else batch.to(device)


def build_batch(
    result: PackResult,
    ids: Tokens,
    labels: Tokens | None,
    fill: int,
    label_fill: int,
    name: str,
    labels_shifted: bool,
    stream: bool,
) -> PackedBatch:
    """Build a batch from flat tokens; see `pack_result_to_tensors`.

    ``name`` is what error messages call the ids.
    """
    plan = result
    if stream:  # one bin that holds exactly all tokens
        total = int(result.item_lengths.sum(dtype=np.int64))
        one_bin = np.array([0, len(result.items)])
        plan = dataclasses.replace(result, offsets=one_bin, capacity=total)
    if len(plan) * plan.capacity >= 2**31:
        raise ValueError(
            f"a batch must have at most 2**31 - 1 slots, got {len(plan)} rows of {plan.capacity}"
        )
    rows = RowLayout(plan, ids.offsets, name)
    tokens = rows.tokens(ids.values, fill, np.int64)
    if labels is None:
        unshifted = rows.labels_from(tokens, label_fill)
    else:
        unshifted = rows.labels(labels.values, label_fill, np.int64)
    row_labels = rows.shifted(unshifted, label_fill) if labels_shifted else unshifted
    label_tensor = torch.from_numpy(row_labels)
    padded = None if stream else torch.from_numpy(rows.cu_seqlens_padded)
    fields = {
        "input_ids": torch.from_numpy(tokens),
        **({} if labels_shifted else {"labels": label_tensor}),
        "position_ids": torch.from_numpy(rows.position_ids()),
        **_boundary_fields(torch.from_numpy(rows.cu_seqlens), padded, int(rows.lengths.max())),
    }
    batch = PackedBatch(fields)
    batch.plan = result
    if labels_shifted:
        batch.labels = label_tensor
    return batch


def check_pad_to_total(pad_to_total: Any, stream: bool) -> None:
    """Raise TypeError or ValueError unless ``pad_to_total`` goes together with ``stream``."""
    if pad_to_total is not None:
        at_least_one("pad_to_total", pad_to_total)
        if not stream:
            raise ValueError(
                f"pad_to_total must be None for rows, got {pad_to_total}: rows have a constant "
                "number of slots already; pass stream=True for one row of all tokens"
            )


def with_dead_tokens(batch: PackedBatch, multiple: int, fill: int, label_fill: int) -> PackedBatch:
    """Fill a stream on the CPU up to a multiple of tokens; see `pack_result_to_tensors`."""
    total, num_seqs = batch.input_ids.numel(), len(batch.cu_seqlens) - 1
    dead = -total % multiple
    # No position exceeds those of the sequences, because a model may not have it.
    values = {
        "input_ids": torch.full((dead,), fill),
        "labels": torch.full((dead,), label_fill),
        "position_ids": torch.arange(dead) % batch.max_seqlen,
    }
    filled = {
        name: torch.cat([getattr(batch, name), values[name][None]], dim=1) for name in _BY_TOKEN
    }
    unused = rounded_sequences(num_seqs) - num_seqs
    cu_seqlens = nn.functional.pad(batch.cu_seqlens, (0, unused), value=total + dead)
    # torch.compile specializes this number, so it must seldom change.
    longest = 1 << (max(batch.max_seqlen, dead) - 1).bit_length()
    fields = _boundary_fields(cu_seqlens, None, longest)
    tokens = {name: filled[name] for name in _BY_TOKEN if name in batch}
    result = PackedBatch(tokens | fields | {"dead_tokens": torch.tensor(dead)})
    result.plan = batch.plan
    if "labels" not in batch:  # shifted labels
        result.labels = filled["labels"]
    return result


def _boundary_fields(cu_seqlens: Tensor, padded: Tensor | None, max_seqlen: int) -> dict[str, Any]:
    """Return the boundaries for patched models, and for flash attention on unpatched ones."""
    fields: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
    pieces, longest = cu_seqlens, max_seqlen
    if padded is not None:
        fields["cu_seqlens_padded"] = padded
        ends = padded[:-1] + cu_seqlens.diff()
        pieces = torch.stack([padded[:-1], ends], dim=1).flatten()
        pieces = torch.cat([pieces, padded[-1:]]).unique_consecutive()  # with pieces of padding
        longest = int(pieces.diff().max())
    return {
        **fields,
        "use_cache": False,
        "cu_seq_lens_q": pieces,
        "cu_seq_lens_k": pieces,
        "max_length_q": longest,
        "max_length_k": longest,
    }
