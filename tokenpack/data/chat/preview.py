"""preview: what is learned of a conversation, or of any batch, as a marked text.

Conversations are rendered and tokenized as `chat_dataset` does it, so the text is the exact text.
A batch has ids alone, so its text is what the tokenizer decodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...checks import IGNORE_INDEX, at_least_one
from .checks import CHECKS, names_of
from .marked import MarkedSequence, Piece, Preview
from .pipeline import ChatOptions, ChatPipeline, Sample

_MESSAGE = ("role", "from")


class _Row(NamedTuple):
    """A sequence of a batch: ``ids`` and ``learned``, both of one length."""

    title: str
    ids: NDArray[np.int64]
    learned: NDArray[np.bool_]


def preview(sample: Any, tokenizer: Any, *, n: int = 3, **options: Any) -> Preview:
    """Show what is learned: a text with its targets marked, their shares, and the checks' result.

    Args:
        sample: a conversation in any schema of `chat_dataset`, or a list of them; or a batch: a row
            with ``input_ids`` and ``labels``, a padded batch, a `PackedBatch`, `PackedPairs`, rows
            of `pack_dataset`, or a batch of `CappedSeq2SeqCollator` and
            `T5SpanCorruptionCollatorFast`.
        tokenizer: of transformers. For conversations it must have a chat template.
        n: sequences to show, at most.
        options: for conversations, those of `chat_dataset` that decide what a row becomes:
            ``loss_on``, ``train_on_terminator``, ``max_length``, ``truncation``, ``keep``,
            ``schema``, ``loss_weights``, ``template_kwargs``, ``generation_config``.

    Returns:
        A `Preview`. Print it, or call its ``render("color")``, ``render("plain")`` or ``html()``.

    Raises:
        TypeError: if ``sample`` is nothing of this.
        ValueError: as `chat_dataset` does for a row.
    """
    at_least_one("n", n)
    rows = _as_rows(sample)
    if rows and all(isinstance(row, Mapping) and "input_ids" in row for row in rows):
        if options:
            raise TypeError(f"options must be given for conversations only, got {[*options]}")
        found = islice(_enumerate_rows(rows), n)
        return Preview([_mark_row(row, tokenizer) for row in found], _padding_of(rows))
    pipeline = ChatPipeline(tokenizer, ChatOptions(**options))
    whole = ChatPipeline(tokenizer, ChatOptions(**{**options, "max_length": None}))
    return preview_rows(list(enumerate(rows)), pipeline, whole, tokenizer, n)


def preview_rows(
    rows: Sequence[tuple[int, Any]],
    pipeline: ChatPipeline,
    whole: ChatPipeline,
    tokenizer: Any,
    n: int,
    *,
    sparse: bool = False,
) -> Preview:
    """The preview of conversations.

    Args:
        rows: pairs of a row's number and the row.
        pipeline: makes samples of them.
        whole: the same without truncation, to count what is dropped.
        tokenizer: of both.
        n: samples to show, at most.
        sparse: see `read_conversation`.
    """
    marked: list[MarkedSequence] = []
    for row in rows:
        samples = pipeline.encode([row], sparse=sparse)
        lengths = [len(each.encoded.ids) for each in whole.encode([row], sparse=sparse)]
        for at, sample in enumerate(samples):
            part = f", part {at + 1} of {len(samples)}" if len(samples) > 1 else ""
            dropped = max(lengths[at] - len(sample.encoded.ids), 0) if at < len(lengths) else 0
            title = f"row {sample.row}{part}{'' if sample.kept else ', not in the dataset'}"
            marked.append(_mark_sample(sample, title, dropped, pipeline, tokenizer))
        if len(marked) >= n:
            break
    return Preview(marked[:n])


# ----------------------------------------------------------------------------------- conversations


def _mark_sample(
    sample: Sample, title: str, dropped: int, pipeline: ChatPipeline, tokenizer: Any
) -> MarkedSequence:
    encoded = sample.encoded
    text = encoded.rendering.text
    offsets = pipeline.offsets(text)
    kept = offsets[encoded.begin : encoded.begin + len(encoded.ids)]
    # The characters between two tokens belong to the second: offsets may leave out white space.
    begin = offsets[encoded.begin - 1][1] if encoded.begin and kept else 0
    starts = [begin, *(end for _, end in kept)]
    if kept and encoded.begin + len(kept) == len(offsets):
        starts[-1] = len(text)
    learned = encoded.labels != IGNORE_INDEX
    pieces = [
        Piece(text[starts[first] : starts[last]], bool(learned[first]))
        for first, last in _same_kind(learned)
    ]
    return MarkedSequence(
        title,
        [piece for piece in pieces if piece.text],
        len(encoded.ids),
        encoded.targets,
        dropped,
        _boundaries(encoded.ids, learned, tokenizer),
        [f"{name} ({CHECKS[name].partition(';')[0]})" for name in names_of(sample.flags)],
    )


def _as_rows(sample: Any) -> list[Any]:
    """The conversations or rows in ``sample``."""
    if isinstance(sample, Mapping):
        return _rows_of_columns(sample)
    if not isinstance(sample, Sequence) or isinstance(sample, (str, bytes)):
        raise TypeError(
            "sample must be a conversation, a batch with input_ids, or a list of them, got "
            f"{type(sample).__name__}"
        )
    rows = list(sample)
    messages = bool(rows) and all(
        isinstance(row, Mapping) and any(name in row for name in _MESSAGE) for row in rows
    )
    return [rows] if messages else rows


# ----------------------------------------------------------------------------------------- batches


def _rows_of_columns(batch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A batch, or the rows of one that has a list of lists of ids, as `datasets` slices have."""
    ids = batch.get("input_ids")
    if not (isinstance(ids, list) and ids and isinstance(ids[0], (list, tuple))):
        return [batch]
    columns = {name: values for name, values in batch.items() if isinstance(values, list)}
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def _mark_row(row: _Row, tokenizer: Any) -> MarkedSequence:
    ids = row.ids.tolist()
    text = _decode(tokenizer, ids)
    runs = _same_kind(row.learned)
    ends = [0, *(_decoded_length(tokenizer, ids[:last], text) for _, last in runs[:-1]), len(text)]
    pieces = [
        Piece(text[ends[at] : ends[at + 1]], bool(row.learned[first]))
        for at, (first, _) in enumerate(runs)
    ]
    return MarkedSequence(
        row.title,
        [piece for piece in pieces if piece.text],
        len(ids),
        int(row.learned.sum()),
        boundaries=_boundaries(row.ids, row.learned, tokenizer),
        problems=[] if row.learned.any() else [f"no_target ({CHECKS['no_target']})"],
    )


def _decoded_length(tokenizer: Any, ids: list[int], text: str) -> int:
    """The characters of ``text`` that the first ids write. A character that they begin only, in a
    tokenizer of bytes, belongs to the rest."""
    part = _decode(tokenizer, ids)
    pairs = enumerate(zip(part, text))
    return next((at for at, (one, other) in pairs if one != other), min(len(part), len(text)))


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _enumerate_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[_Row]:
    for number, row in enumerate(rows):
        where = f"row {number}, " if len(rows) > 1 else ""
        yield from _sequences_of(row, where)


def _sequences_of(batch: Mapping[str, Any], where: str) -> Iterator[_Row]:
    """The sequences of a batch, of one kind or another."""
    ids = _array(batch["input_ids"])
    labels = _labels_of(batch)
    if "decoder_cu_seqlens" in batch:  # packed pairs
        sources = _cut(ids.ravel(), _array(batch["cu_seqlens"]))
        targets = _cut(_array(batch["labels"]).ravel(), _array(batch["decoder_cu_seqlens"]))
        yield from _pairs(sources, targets, where)
    elif "cu_seqlens" in batch:
        starts = _array(batch.get("cu_seqlens_padded", batch["cu_seqlens"]))[:-1]
        lengths = np.diff(_array(batch["cu_seqlens"]))
        yield from _causal(ids, labels, starts, lengths, where)
    elif batch.get("seq_lengths") is not None:
        lengths = _array(batch["seq_lengths"])
        yield from _causal(ids, labels, np.cumsum(lengths) - lengths, lengths, where)
    else:
        yield from _padded(batch, np.atleast_2d(ids), labels, where)


def _labels_of(batch: Mapping[str, Any]) -> NDArray[Any] | None:
    """The labels, not shifted."""
    if "labels" in batch:
        return None if batch["labels"] is None else _array(batch["labels"])
    if getattr(batch, "labels", None) is None:
        return None
    # An attribute that is no field: a `PackedBatch` whose labels are shifted.
    shifted = _array(batch.labels)  # type: ignore[attr-defined]
    return np.concatenate([[IGNORE_INDEX], shifted.ravel()[:-1]]).reshape(shifted.shape)


def _padded(
    batch: Mapping[str, Any], ids: NDArray[Any], labels: NDArray[Any] | None, where: str
) -> Iterator[_Row]:
    mask = batch.get("attention_mask")
    mask = np.ones_like(ids, bool) if mask is None else np.atleast_2d(_array(mask)) != 0
    if labels is not None and _are_targets(batch, ids, labels):
        sources = [row[kept] for row, kept in zip(ids, mask)]
        yield from _pairs(sources, list(np.atleast_2d(labels)), where)
        return
    known = np.full_like(ids, IGNORE_INDEX) if labels is None else np.atleast_2d(labels)
    for at, (row, kept, label) in enumerate(zip(ids, mask, known)):
        yield _Row(f"{where}sequence {at}", row[kept], label[kept] != IGNORE_INDEX)


def _are_targets(batch: Mapping[str, Any], ids: NDArray[Any], labels: NDArray[Any]) -> bool:
    """Whether the labels are another text, and not those of ``ids``."""
    if "decoder_input_ids" in batch or ids.shape != np.atleast_2d(labels).shape:
        return True
    known = np.atleast_2d(labels) != IGNORE_INDEX
    return bool((ids[known] != np.atleast_2d(labels)[known]).any())


def _causal(
    ids: NDArray[Any], labels: NDArray[Any] | None, starts: Any, lengths: Any, where: str
) -> Iterator[_Row]:
    flat = ids.ravel()
    known = np.full_like(flat, IGNORE_INDEX) if labels is None else labels.ravel()
    for at, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist())):
        part = slice(start, start + length)
        yield _Row(f"{where}sequence {at}", flat[part], known[part] != IGNORE_INDEX)


def _pairs(sources: Sequence[Any], targets: Sequence[Any], where: str) -> Iterator[_Row]:
    """Sources are context. Targets are learned, where they are not padding."""
    for at, (source, target) in enumerate(zip(sources, targets)):
        target = target[target != IGNORE_INDEX]
        learned = np.arange(len(source) + len(target)) >= len(source)
        yield _Row(f"{where}pair {at}", np.concatenate([source, target]), learned)


def _cut(values: NDArray[Any], boundaries: NDArray[Any]) -> list[NDArray[Any]]:
    return [values[first:last] for first, last in zip(boundaries[:-1], boundaries[1:])]


def _array(values: Any) -> NDArray[Any]:
    """An array of a list, an array, or a tensor on any device."""
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values)


def _padding_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How much of the batches is padding."""
    slots = sum(_array(row["input_ids"]).size for row in rows)
    tokens = sum(len(each.ids) for each in _enumerate_rows(rows))
    if tokens >= slots:  # also pairs, whose targets are another field
        return []
    return [f"{slots:,} slots, {slots - tokens:,} of them padding ({1 - tokens / slots:.1%})"]


# ---------------------------------------------------------------------------------------- both


def _same_kind(learned: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """The runs of tokens that are all learned or all context, as first and last (exclusive)."""
    if not len(learned):
        return []
    changes = (np.flatnonzero(np.diff(learned)) + 1).tolist()
    return list(zip([0, *changes], [*changes, len(learned)]))


def _boundaries(ids: Any, learned: NDArray[np.bool_], tokenizer: Any) -> list[str]:
    """The token before and the token after each change, with their ids."""
    lines = []
    for first, _ in _same_kind(learned)[1:]:
        before, after = (
            f"{int(ids[at])} {_decode(tokenizer, [int(ids[at])])!r}" for at in (first - 1, first)
        )
        to = "learned" if learned[first] else "context"
        lines.append(f"token {first}: {before} | {after}  -> {to}")
    return lines
