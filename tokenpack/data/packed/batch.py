"""Packed batches for a causal model: plans and samples to tensors that keep sequences apart.

What ``model(**batch)`` hands over isolates the sequences in every way there is to run the model:

- patched by `patch_model`: by ``cu_seqlens`` and ``cu_seqlens_padded``; padding is left out;
- unpatched, with SDPA, eager or flex attention: by ``position_ids``, which begin anew with every
  sequence. transformers makes the mask out of them if it is given no attention mask and keeps no
  cache, and so there is none among the fields, and ``use_cache`` is False;
- unpatched, with flash attention: by ``cu_seq_lens_q`` and the like; position ids it would heed in
  a batch of one row only.

The padding behind a row's last sequence is a sequence to itself in all of these: each of its slots
sees one at least, and no softmax is over nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...checks import IGNORE_INDEX, as_integer
from ...packing import Packer, PackResult
from ..tokens import Rows, Tokens, flatten_tokens, require_fits, require_same_lengths
from .base import pad_rows

_BY_TOKEN = ("input_ids", "labels", "position_ids")


class PackedBatch(dict[str, Any]):
    """Sequences side by side in rows, and everything that keeps them apart.

    A mapping of what a model takes: ``model(**batch)``, patched or not, gives each sequence the
    logits that it has alone, and ``loss`` is that of the same sequences padded. Unpatched, this
    holds for causal language models whose mask transformers makes of position ids (Llama, Mistral,
    Qwen, Gemma and their kin); `isolated_by` tries it on yours. Encoders (BERT) and models that
    make their masks or positions themselves (OPT, BLOOM, Falcon, Mamba) are told of no boundary
    unless they are patched. It is for forwards: ``generate`` takes no such fields.

    Each field is an attribute as well, to be read and set.

    Attributes:
        input_ids: ``(rows, capacity)`` int64.
        labels: ``(rows, capacity)`` int64. By default for a loss that shifts inside, as the models
            of Hugging Face do: not shifted, -100 at the first token of every sequence, so that no
            token is asked for a neighbour's, and at padding. With ``labels_shifted=True`` for a
            loss on ``logits`` and ``labels`` as they stand: each token has the next one's, the last
            one of a sequence -100. Those are an attribute alone: a model given them would shift
            them once more.
        position_ids: ``(rows, capacity)`` int64, from 0 in every sequence and in a row's padding.
        cu_seqlens: ``(num_seqs + 1,)`` int32, boundaries of the sequences in the stream of the
            batch's tokens, row after row, without padding.
        cu_seqlens_padded: ``(num_seqs + 1,)`` int32, the slot that each sequence begins in, rows
            flattened; last, the number of slots. A stream, which has no padding, goes without.
        max_seqlen: length of the longest sequence.
        use_cache: False.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: ``cu_seqlens`` and ``max_seqlen``
            of the flattened rows, padding included, for transformers' own flash attention.
        plan: which sample each sequence is, and what was dropped or cut; no field of the mapping,
            and None where the batch was built by hand.
    """

    plan: PackResult | None = None

    def __init__(self, *fields: Any, **more: Any) -> None:
        super().__init__(*fields, **more)
        self._require_whole()

    def _require_whole(self) -> None:
        """Refuse what was cut by rows, as accelerate cuts batches that it deals out to processes.

        Looks at tensors on the CPU alone: elsewhere it would wait for the device.
        """
        ids, starts = self.get("input_ids"), self.get("cu_seqlens_padded", self.get("cu_seqlens"))
        if not (isinstance(ids, Tensor) and isinstance(starts, Tensor) and starts.is_cpu):
            return
        if not len(starts) or int(starts[-1]) != ids.numel():
            raise ValueError(
                f"the boundaries of a packed batch must end at its {ids.numel()} slots, got "
                f"{int(starts[-1]) if len(starts) else 'none'}: it cannot be cut by rows "
                "(with accelerate, set dispatch_batches=False)"
            )

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"PackedBatch has no {name!r}; its fields are {', '.join(self)}"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self:
            self[name] = value  # else the attribute would say one thing and the model get another
        else:
            super().__setattr__(name, value)

    @property
    def attention_mask(self) -> Tensor:
        """``(rows, capacity)`` int64, 1 at tokens and 0 at padding.

        No field: given a mask, a model takes each row for one sequence.
        """
        rows, columns = self.input_ids.shape
        starts, lengths = self._starts(), self.cu_seqlens.diff().long()
        steps = torch.zeros(rows * columns + 1, dtype=torch.int64, device=starts.device)
        one = torch.ones_like(starts)
        steps.index_add_(0, starts, one).index_add_(0, starts + lengths, -one)
        return steps[:-1].cumsum(0).view(rows, columns)

    @property
    def boundaries(self) -> list[Tensor]:
        """One ``(num_seqs, 2)`` int64 for each row: columns its sequences begin and end at."""
        rows, columns = self.input_ids.shape
        starts, lengths = self._starts(), self.cu_seqlens.diff().long()
        begins = starts % columns
        counts = torch.bincount(starts // columns, minlength=rows)
        return list(torch.stack([begins, begins + lengths], dim=1).split(counts.tolist()))

    @property
    def stream(self) -> PackedBatch:
        """The same sequences as one row of all their tokens, without any padding.

        What a patched model makes of the batch anyway, and the form for flash attention. SDPA and
        eager attention on an unpatched model take memory that grows with its square.
        """
        real = self.attention_mask.flatten().nonzero()[:, 0]
        fields: dict[str, Any] = {
            name: self[name].flatten()[real][None] for name in _BY_TOKEN if name in self
        }
        fields |= _boundary_fields(self.cu_seqlens, None, self.max_seqlen)
        labels = vars(self).get("labels")
        stream = self._with(fields)
        if labels is not None:
            stream.labels = labels.flatten()[real][None]
        return stream

    def select(self, sequences: Any) -> PackedBatch:
        """Some of the sequences, in this order, as a `stream`.

        Args:
            sequences: ``(k,)`` integers, at least one; 0 is the first sequence of ``cu_seqlens``.
        """
        chosen = torch.as_tensor(sequences, dtype=torch.int64).to(self.cu_seqlens.device)
        lengths = self.cu_seqlens.diff().long()[chosen]
        ends = lengths.cumsum(0)
        steps = torch.arange(int(ends[-1]), device=ends.device)
        slots = steps + (self._starts()[chosen] - ends + lengths).repeat_interleave(lengths)
        slots = slots.to(self.input_ids.device)
        fields: dict[str, Any] = {
            name: self[name].flatten()[slots][None] for name in _BY_TOKEN if name in self
        }
        cu_seqlens = nn.functional.pad(ends, (1, 0)).to(torch.int32)
        return type(self)(fields | _boundary_fields(cu_seqlens, None, int(lengths.max())))

    def padded(self, pad_token_id: int) -> dict[str, Tensor]:
        """The same sequences as an ordinary batch, each in a row of its own.

        Returns:
            ``input_ids``, ``attention_mask`` and maybe ``labels``: ``(num_seqs, max_seqlen)``.
        """
        every = self.select(torch.arange(len(self.cu_seqlens) - 1))
        lengths = every.cu_seqlens.cpu().diff()
        rows, mask = pad_rows(every.input_ids[0], lengths, pad_token_id)
        batch = {"input_ids": rows, "attention_mask": mask.long()}
        if "labels" in every:
            batch["labels"], _ = pad_rows(every.labels[0], lengths, IGNORE_INDEX)
        return batch

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PackedBatch:
        """The same batch with its tensors on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, from which ``to`` can copy without waiting."""
        return self._map(Tensor.pin_memory)

    @staticmethod
    def isolated_by(model: nn.Module) -> bool:
        """Whether ``model(**batch)`` keeps sequences apart as ``model`` is now: tried on two.

        Two small forwards in evaluation mode, the second with another first sequence and another
        row. What the model says about the rest must not change.
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
            for module in training:  # and not those that were frozen
                module.training = True
        one, other = one[3:7], other[3:7]
        # The same kernels on the same shapes: rounding has hardly a reason to differ.
        allowed = 4 * torch.finfo(one.dtype).eps * one.abs().max()
        return bool((one - other).abs().max() <= allowed)

    def _starts(self) -> Tensor:
        """``(num_seqs,)`` int64, the slot that each sequence begins in."""
        slots = self.get("cu_seqlens_padded")
        return (self.cu_seqlens if slots is None else slots)[:-1].long()

    def _map(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        changed: dict[int, Tensor] = {}  # a tensor under two names stays one

        def one(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in changed:
                changed[id(value)] = change(value)
            return changed[id(value)]

        batch = self._with({name: one(value) for name, value in self.items()})
        batch.__dict__.update({name: one(value) for name, value in vars(self).items()})
        return batch

    def _with(self, fields: dict[str, Any]) -> PackedBatch:
        batch = type(self)(fields)
        batch.plan = self.plan
        return batch


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
) -> PackedBatch:
    """Carry out a plan: its bins as the rows of a batch.

    Args:
        result: the plan, for the lengths of ``token_ids``.
        token_ids: the sequences; lists or tuples of ints, one-dimensional NumPy arrays or CPU
            tensors, or an Arrow or datasets column of lists.
        labels: as many, of the same lengths and not shifted; by default ``token_ids``.
        padding_value: what stands in ``input_ids`` at padding.
        label_padding_value: what stands in ``labels`` where nothing is asked. Anything but -100 is
            for your own loss: those of Hugging Face ignore -100 alone.
        device: where the batch goes; by default it stays on the CPU.
        labels_shifted: give each token the label of the next one, for a loss that does not shift;
            see `PackedBatch`.
        stream: one row of all tokens in place of one row for each bin, without any padding.

    Returns:
        The batch, its sequences in the order of the plan.

    Raises:
        TypeError: if ids, labels or values are no integers.
        ValueError: if lengths are not those of the plan or of one another, or a sequence is empty.
    """
    fill = as_integer("padding_value", padding_value)
    label_fill = as_integer("label_padding_value", label_padding_value)
    empty = bool(len(result.dropped))  # they may be what was dropped
    ids = flatten_tokens(token_ids, "token_ids", empty=empty)
    targets = None if labels is None else flatten_tokens(labels, "labels", empty=True)
    if targets is not None:
        require_same_lengths(ids, "token_ids", targets, "labels")
    batch = _batch(result, ids, targets, fill, label_fill, "token_ids", labels_shifted, stream)
    return batch if device is None else batch.to(device)


def packed_collate_fn(
    capacity: int,
    strategy: str = "auto",
    seed: int | None = None,
    padding_value: int = 0,
    label_padding_value: int = IGNORE_INDEX,
    *,
    labels_shifted: bool = False,
    overlong: str = "error",
    max_sequences: int | None = None,
    stream: bool = False,
) -> PackedCollator:
    """A ``collate_fn`` that packs the samples of a batch into rows.

    What it returns takes a list of samples: lists of ints, one-dimensional NumPy arrays or CPU
    tensors, or mappings with such ``input_ids``, and maybe ``labels`` (not shifted; the ids where
    there are none) and ``attention_mask`` (tokens under a 0 are padding, and left out). Other
    fields are left alone: positions and masks follow from the packing. It can be pickled, so
    workers of a ``DataLoader`` may run it, and is also the ``data_collator`` of a ``Trainer``.

    Args:
        capacity: tokens of a row.
        strategy: any of `tokenpack.packing.Packer.strategies()` or "auto". "nf" keeps the order.
        seed: of strategies that shuffle.
        padding_value: what stands in ``input_ids`` at padding.
        label_padding_value: what stands in ``labels`` where nothing is asked; see
            `pack_result_to_tensors`.
        labels_shifted: labels for a loss that does not shift; by default they are for one that
            does, as the models of Hugging Face do. See `PackedBatch`.
        overlong: what to do with a sample over capacity: raise an "error", "truncate", "split" or
            "drop" it. ``batch.plan`` says which were.
        max_sequences: how many samples a row may hold, if there is a limit.
        stream: give one row of all tokens, without any padding: least to move and to compute for a
            patched model or flash attention. Rows are for SDPA and eager attention on an unpatched
            model, where memory grows with the square of a row.

    Raises:
        TypeError: if a number is no integer.
        ValueError: if ``capacity`` is below 1 or a name is unknown.
    """
    return PackedCollator(
        Packer(capacity, strategy, seed, max_sequences=max_sequences, overlong=overlong),
        as_integer("padding_value", padding_value),
        as_integer("label_padding_value", label_padding_value),
        labels_shifted,
        stream,
    )


@dataclasses.dataclass(frozen=True)
class PackedCollator:
    """What `packed_collate_fn` returns: samples to a `PackedBatch`."""

    packer: Packer
    padding_value: int
    label_padding_value: int
    labels_shifted: bool
    stream: bool

    def __call__(self, samples: Sequence[Any]) -> PackedBatch:
        """Pack ``samples``.

        Raises:
            TypeError: if a sample, or a field of it, is nothing that can be packed.
            ValueError: if there is none, or one is empty, too long, or contradicts itself.
        """
        ids, labels, name = take_apart(samples)
        if self.packer.overlong == "error":
            instead = " (overlong= truncate, split or drop)"
            require_fits(ids, name, self.packer.capacity, "capacity", instead)
        return _batch(
            self.packer.pack(ids.lengths),
            ids,
            labels,
            self.padding_value,
            self.label_padding_value,
            name,
            self.labels_shifted,
            self.stream,
        )


def take_apart(samples: Sequence[Any], *, empty: bool = False) -> tuple[Tokens, Tokens | None, str]:
    """``(ids, labels, what errors call the ids)``, without what attention masks leave out.

    ``empty`` says whether samples without tokens are welcome.
    """
    if not isinstance(samples, (list, tuple)) or not samples:
        raise TypeError(f"samples must be a list of at least one sample, got {samples!r:.80}")
    mappings = [isinstance(sample, Mapping) for sample in samples]
    if not any(mappings):
        return flatten_tokens(samples, "samples", empty=empty), None, "samples"
    if not all(mappings):
        at = mappings.index(False)
        raise TypeError(
            f"samples must all be mappings or none, samples[{at}] is a "
            f"{type(samples[at]).__name__}, samples[{mappings.index(True)}] a mapping"
        )
    ids = flatten_tokens(_field(samples, "input_ids"), _name("input_ids"), empty=empty)
    labels = mask = None
    if any("labels" in sample for sample in samples):
        labels = flatten_tokens(_field(samples, "labels"), _name("labels"), empty=True)
        require_same_lengths(ids, _name("input_ids"), labels, _name("labels"))
    if any("attention_mask" in sample for sample in samples):
        mask_name = _name("attention_mask")
        given = _field(samples, "attention_mask")
        mask = flatten_tokens(given, mask_name, empty=True, bools=True)
        require_same_lengths(ids, _name("input_ids"), mask, mask_name)
        ids, labels = _unmasked(ids, labels, mask, empty)
    return ids, labels, _name("input_ids")


def _field(samples: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    try:
        return [sample[name] for sample in samples]
    except KeyError:
        at = next(at for at, sample in enumerate(samples) if name not in sample)
        raise ValueError(
            f"every sample must have {name!r} or none, samples[{at}] has only "
            f"{', '.join(map(repr, samples[at])) or 'nothing'}"
        ) from None


def _name(field: str) -> str:
    return f"{field} of samples"


def _unmasked(
    ids: Tokens, labels: Tokens | None, mask: Tokens, empty: bool
) -> tuple[Tokens, Tokens | None]:
    real = mask.values == 1
    if not (real | (mask.values == 0)).all():
        token = int((real | (mask.values == 0)).argmin())
        at = int(np.searchsorted(mask.offsets, token, side="right")) - 1
        raise ValueError(
            f"{_name('attention_mask')}[{at}] must be 0 and 1 alone, got {mask.values[token]}"
        )
    if real.all():
        return ids, labels
    offsets = np.append(0, np.cumsum(real))[mask.offsets]
    if not empty and not np.diff(offsets).all():
        at = int(np.diff(offsets).argmin())
        raise ValueError(f"{_name('attention_mask')}[{at}] must leave one token at least, got none")
    kept = None if labels is None else Tokens(labels.values[real], offsets)
    return Tokens(ids.values[real], offsets), kept


def _batch(
    result: PackResult,
    ids: Tokens,
    labels: Tokens | None,
    fill: int,
    label_fill: int,
    name: str,
    labels_shifted: bool,
    stream: bool,
) -> PackedBatch:
    plan = result
    if stream:  # one bin of just the size of all
        total = int(result.item_lengths.sum(dtype=np.int64))
        one_bin = np.array([0, len(result.items)])
        plan = dataclasses.replace(result, offsets=one_bin, capacity=total)
    if len(plan) * plan.capacity >= 2**31:
        raise ValueError(
            f"a batch may have at most 2**31 - 1 slots, got {len(plan)} rows of {plan.capacity}"
        )
    rows = Rows(plan, ids.offsets, name)
    tokens = rows.tokens(ids.values, fill, np.int64)
    if labels is None:
        asked = rows.labels_from(tokens, label_fill)
    else:
        asked = rows.labels(labels.values, label_fill, np.int64)
    made = torch.from_numpy(rows.shifted(asked, label_fill) if labels_shifted else asked)
    padded = None if stream else torch.from_numpy(rows.cu_seqlens_padded)
    longest = int(rows.lengths.max())
    fields = {
        "input_ids": torch.from_numpy(tokens),
        **({} if labels_shifted else {"labels": made}),
        "position_ids": torch.from_numpy(rows.position_ids()),
        **_boundary_fields(torch.from_numpy(rows.cu_seqlens), padded, longest),
    }
    batch = PackedBatch(fields)
    batch.plan = result
    if labels_shifted:
        batch.labels = made
    return batch


def _boundary_fields(cu_seqlens: Tensor, padded: Tensor | None, max_seqlen: int) -> dict[str, Any]:
    """What tells the sequences apart: for patched models, and for flash attention on others."""
    fields: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
    pieces, longest = cu_seqlens, max_seqlen
    if padded is not None:
        fields["cu_seqlens_padded"] = padded
        ends = padded[:-1] + cu_seqlens.diff()
        pieces = torch.stack([padded[:-1], ends], dim=1).flatten()
        pieces = torch.cat([pieces, padded[-1:]]).unique_consecutive()  # padding has its own
        longest = int(pieces.diff().max())
    return {
        **fields,
        "use_cache": False,
        "cu_seq_lens_q": pieces,
        "cu_seq_lens_k": pieces,
        "max_length_q": longest,
        "max_length_k": longest,
    }
