"""Where each vector of the two streams is: index computations on the host, in NumPy.

    stream 1   for each segment of a context   [tokens, slots]
    stream 2   for each document               [BOS, vectors, flags, tokens]

Both streams are built by one gather from the rows that they consist of. Nothing is padded, and the
boundaries are explicit (``cu_seqlens``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...segments import offsets_of, ranges

Integers = NDArray[np.int64]


def host_array(values: Any) -> Integers:
    """An integer tensor as an int64 array on the host."""
    array: Integers = values.detach().cpu().numpy().astype(np.int64)
    return array


@dataclass(frozen=True)
class ContextLayout:
    """Stream 1: the segments of all contexts, each followed by its slots.

    Attributes:
        cu_seqlens: ``(num_segments + 1,)``, boundaries in the stream.
        position_ids: ``(total,)``.
        source: ``(total,)``, for each place of the stream a row of [context tokens, slot table].
        slot_at: ``(num_vectors,)``, the places of the slots; empty if tokens are pooled.
        spans: ``(num_vectors,)``, tokens of each pooled span; empty if slots carry the context.
        segment_vectors: ``(num_segments,)``, vectors of each segment.
        doc_segments: ``(num_docs,)``, segments of each document.
        doc_vectors: ``(num_docs,)``, vectors of each document.
    """

    cu_seqlens: Integers
    position_ids: Integers
    source: Integers
    slot_at: Integers
    spans: Integers
    segment_vectors: Integers
    doc_segments: Integers
    doc_vectors: Integers


def count_vectors(
    lengths: Integers, segment_length: int | None, fixed: int | None, ratios: Integers, pools: bool
) -> tuple[Integers, Integers, Integers]:
    """Cut contexts into segments, and count the vectors of each segment.

    Args:
        lengths: ``(num_docs,)``, tokens of each context, at least 1.
        segment_length: longest segment, or None.
        fixed: vectors of each segment, or None.
        ratios: ``(num_docs,)``, tokens per vector, read if ``fixed`` is None.
        pools: a vector is the mean of at least one token.

    Returns:
        ``doc_segments (num_docs,)``, ``segment_lengths`` and ``segment_vectors (num_segments,)``.
    """
    longest = int(lengths.max()) if segment_length is None else segment_length
    doc_segments = -(-lengths // longest)
    segment_lengths = np.full(int(doc_segments.sum()), longest, np.int64)
    segment_lengths[doc_segments.cumsum() - 1] = lengths - (doc_segments - 1) * longest
    if fixed is None:
        segment_vectors = -(-segment_lengths // np.repeat(ratios, doc_segments))
    else:
        segment_vectors = np.full(len(segment_lengths), fixed, np.int64)
    if pools:
        segment_vectors = np.minimum(segment_vectors, segment_lengths)
    return doc_segments, segment_lengths, segment_vectors


def context_layout(
    doc_segments: Integers,
    segment_lengths: Integers,
    segment_vectors: Integers,
    *,
    pools: bool,
    slot_positions: str,
    num_slot_embeddings: int,
) -> ContextLayout:
    """Lay out stream 1. The arguments are the results of `count_vectors` and of the configuration.

    Args:
        doc_segments, segment_lengths, segment_vectors: see `count_vectors`.
        pools: tokens are pooled, and there are no slots.
        slot_positions: as in `CondenserConfig`.
        num_slot_embeddings: rows of the table of slots; with 1, all slots share it.
    """
    slots = np.zeros_like(segment_vectors) if pools else segment_vectors
    bounds = offsets_of(segment_lengths + slots)
    first_token, zeros = offsets_of(segment_lengths)[:-1], np.zeros_like(slots)
    token_at = ranges(bounds[:-1], segment_lengths)
    slot_at = ranges(bounds[:-1] + segment_lengths, slots)
    number = ranges(zeros, slots)  # of each slot in its segment
    source = np.empty(int(bounds[-1]), np.int64)
    source[token_at] = np.arange(int(segment_lengths.sum()))
    row = number if num_slot_embeddings > 1 else np.zeros_like(number)
    source[slot_at] = int(segment_lengths.sum()) + row
    positions = np.empty_like(source)
    positions[token_at] = ranges(zeros, segment_lengths)
    tokens_of_slot = np.repeat(segment_lengths, slots)
    if slot_positions == "end":
        positions[slot_at] = tokens_of_slot + number
    else:
        middle = int(slot_positions == "spread")
        halves = (2 * number + middle) * tokens_of_slot
        positions[slot_at] = halves // (2 * np.repeat(slots, slots))
    spans = np.zeros(0, np.int64)
    if pools:
        spans = _equal_spans(segment_lengths, segment_vectors, first_token)
    segment_of = np.repeat(np.arange(len(doc_segments)), doc_segments)
    doc_vectors = np.bincount(segment_of, segment_vectors, len(doc_segments)).astype(np.int64)
    return ContextLayout(
        bounds, positions, source, slot_at, spans, segment_vectors, doc_segments, doc_vectors
    )


def _equal_spans(lengths: Integers, counts: Integers, first: Integers) -> Integers:
    """Sizes of ``counts[s]`` spans of about equal size that cover the tokens of each segment."""
    number = ranges(np.zeros_like(counts), counts)
    begins = number * np.repeat(lengths, counts) // np.repeat(counts, counts)
    return np.diff(begins + np.repeat(first, counts), append=int(lengths.sum()))


@dataclass(frozen=True)
class DecoderLayout:
    """Stream 2: the sequences of the decoder.

    Attributes:
        cu_seqlens: ``(num_seqs + 1,)``.
        position_ids: ``(total,)``.
        source: ``(total,)``, for each place of the stream a row of the sources, see `Sources`.
        token_at: ``(num_tokens,)``, the places of the tokens.
    """

    cu_seqlens: Integers
    position_ids: Integers
    source: Integers
    token_at: Integers


@dataclass(frozen=True)
class Sources:
    """The rows that stream 2 is gathered from, in this order, and how many there are.

    Attributes:
        bos: 1, or 0 if sequences do not begin with BOS.
        vectors: condensed vectors of all documents.
        separator: 1 if a learned vector follows each segment, otherwise 0.
        completion_flags: in front of prompt and completion.
        reconstruction_flags: in front of the context.
    """

    bos: int
    vectors: int
    separator: int
    completion_flags: int
    reconstruction_flags: int

    def first(self, name: str) -> int:
        """The row of the first ``name``; ``"tokens"`` come last."""
        names = ("bos", "vectors", "separator", "completion_flags", "reconstruction_flags")
        before = names[: names.index(name)] if name in names else names
        return sum(getattr(self, each) for each in before)


def vector_rows(
    segment_vectors: Integers, doc_segments: Integers, sources: Sources
) -> tuple[Integers, Integers]:
    """Rows of the sources that stand for each document, with separators, and how many each has."""
    rows = sources.first("vectors") + np.arange(sources.vectors)
    per_segment = segment_vectors
    if sources.separator:
        ends = segment_vectors.cumsum()
        rows = np.insert(rows, ends, sources.first("separator"))
        per_segment = segment_vectors + 1
    document = np.repeat(np.arange(len(doc_segments)), doc_segments)
    counts = np.bincount(document, per_segment, len(doc_segments)).astype(np.int64)
    return rows, counts


def decoder_layout(
    rows: Integers,
    row_counts: Integers,
    documents: Integers,
    flags: Integers,
    num_flags: Integers,
    token_lengths: Integers,
    sources: Sources,
) -> DecoderLayout:
    """Lay out stream 2.

    Args:
        rows: the rows of the sources that stand for the documents, one document after the other.
        row_counts: ``(num_docs,)``, how many rows each document has.
        documents: ``(num_seqs,)``, the document that each sequence begins with; -1 for none.
        flags: ``(num_seqs,)``, the first row of each sequence's flags.
        num_flags: ``(num_seqs,)``.
        token_lengths: ``(num_seqs,)``, tokens of each sequence, which follow the flags.
        sources: what the rows are.
    """
    starts = offsets_of(row_counts)
    counts = np.where(documents < 0, 0, row_counts[documents])
    bounds = offsets_of(sources.bos + counts + num_flags + token_lengths)
    source = np.empty(int(bounds[-1]), np.int64)
    at = bounds[:-1]
    if sources.bos:
        source[at] = sources.first("bos")
        at = at + 1
    source[ranges(at, counts)] = rows[ranges(starts[np.maximum(documents, 0)], counts)]
    at = at + counts
    source[ranges(at, num_flags)] = ranges(flags, num_flags)
    at = at + num_flags
    token_at = ranges(at, token_lengths)
    source[token_at] = sources.first("tokens") + np.arange(len(token_at))
    positions = ranges(np.zeros(len(documents), np.int64), np.diff(bounds))
    return DecoderLayout(bounds, positions, source, token_at)
