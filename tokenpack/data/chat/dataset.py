"""chat_dataset: conversations of any source as a dataset of ids and labels."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

try:
    import datasets
    import pyarrow as pa
    from datasets.fingerprint import Hasher
except ImportError as error:
    raise ImportError(
        "chat_dataset needs datasets and pyarrow: pip install 'tokenpack[data]'"
    ) from error

from ...checks import optional_at_least_one
from .checks import CHECKS, ChatReport, act, count_padding, read_actions
from .pipeline import ChatOptions, ChatPipeline, Sample, count_samples
from .sources import columns_of, first_rows, open_source, rows_of
from .templates import ChatTemplate, set_template

_VERSION = 1  # of the rows that the same options give; part of the cache's key
_BATCH = 1000  # rows that are tokenized together
_SAMPLE = 100  # rows that are checked before all
_NOTES = ("_row", "_kept", "_flags", "_cut_messages", "_cut_tokens", "_targets")


def chat_dataset(
    source: Any,
    tokenizer: Any,
    *,
    template: str | ChatTemplate | None = None,
    loss_on: str | Collection[str] = "all",
    train_on_terminator: bool = True,
    max_length: int | None = None,
    truncation: str = "turn",
    keep: str = "first",
    schema: str | None = None,
    loss_weights: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    generation_config: Any = None,
    checks: str | Mapping[str, str] = "warn",
    split: str = "train",
    streaming: bool = False,
    num_proc: int | None = None,
    cache_dir: str | PathLike[str] | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Render, tokenize and mask conversations for supervised fine-tuning.

    A learned token is one that the model would sample: the content, reasoning and tool calls of an
    answer and the token that ends the turn, but neither headers nor empty blocks for reasoning that
    the template adds. The spans come from the template's ``{% generation %}`` markers, else from
    the texts of the conversation's beginnings. If the template writes these differently when more
    messages follow, the conversation becomes several rows, one for each answer.

    Args:
        source: rows, or where they are: a list of mappings or of lists of messages; a path, glob or
            folder, or a list of paths, of ``.json``, ``.jsonl`` (also ``.gz``, ``.zst``) or
            ``.parquet`` files; a `datasets.Dataset` or `IterableDataset`; a name on the hub. Each
            row has one of the schemas ``messages`` (role and content, or from and value),
            ``conversations`` (the same), ``prompt`` with ``completion`` or ``response`` (texts or
            messages), ``instruction`` with ``input`` and ``output``. It may have ``system``,
            ``tools``, ``documents`` and ``chat_template_kwargs``. A message may have ``train:
            false`` or a ``weight``.
        tokenizer: of transformers, backed by the ``tokenizers`` library.
        template: a `ChatTemplate`, the name of one, or jinja. It is set on the tokenizer. None uses
            the tokenizer's own.
        loss_on: ``"all"`` answers, the ``"last"`` answer of a row, or the roles to learn.
        train_on_terminator: learn the token that ends a turn.
        max_length: the most tokens of a row; None for any number.
        truncation: for longer conversations. ``"turn"`` keeps the system message and as many whole
            pairs as fit, and leaves out pairs that do not fit alone; ``"token"`` cuts; ``"drop"``
            drops; ``"error"`` raises an error.
        keep: whether ``"turn"`` and ``"token"`` keep the ``"first"`` or the ``"last"`` ones.
        schema: ``"messages"``, ``"conversations"``, ``"prompt_response"`` or ``"instruction"`` for
            all rows; by default it is detected for each.
        loss_weights: add a column ``loss_weights``, float32: the weight of each token. Without it,
            weights of messages must be 0 or 1.
        template_kwargs: more variables of the template, such as ``enable_thinking``.
        generation_config: the model's, or ids of tokens, that generation stops at; by default the
            tokenizer's EOS. Used by the checks.
        checks: what to do about problems: ``"warn"``, ``"error"`` or ``"ignore"``, or a mapping
            from names of checks to these. The first rows are checked before all others. ``padding``
            is only counted, unless the mapping names it.
        split: of a name on the hub.
        streaming: read files and names as a stream.
        num_proc: processes; not for streams.
        cache_dir: a folder for the rows of a list, which are kept in memory otherwise. Other
            sources are cached where `datasets` caches them.

    Returns:
        A dataset with the columns ``input_ids`` and ``labels`` (int32, not shifted, -100 where
        nothing is learned) and ``length``. Its attribute ``chat_report`` is a `ChatReport` with all
        counts. A stream has no counts; it supports ``state_dict``, and warns about a problem once.

    Raises:
        ImportError: if the ``data`` extra is not installed.
        TypeError: if an argument or a row has the wrong type.
        ValueError: if an option is unknown; naming the row, if it has no known schema, if the
            template cannot write it or if its spans cannot be found; if the tokenizer splits a
            special token of a `ChatTemplate`; if a check with the action ``"error"`` finds a
            problem; if no row is left.
    """
    options = ChatOptions(
        loss_on if isinstance(loss_on, str) else tuple(loss_on),
        train_on_terminator,
        max_length,
        truncation,
        keep,
        schema,
        loss_weights,
        template_kwargs,
        generation_config,
    )
    actions = read_actions(checks)
    optional_at_least_one("num_proc", num_proc)
    set_template(tokenizer, template)
    opened = open_source(source, split, streaming)
    return encode_opened(opened, tokenizer, options, actions, num_proc, cache_dir)


def encode_opened(
    opened: tuple[Any, str | None],
    tokenizer: Any,
    options: ChatOptions,
    actions: Mapping[str, str],
    num_proc: int | None = None,
    cache_dir: str | PathLike[str] | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Encode a source that `open_source` opened; see `chat_dataset`.

    Args:
        opened: the dataset, and the column that holds each row as JSON, or None.
        tokenizer: with a chat template.
        options: what a row becomes.
        actions: what to do about problems, from `read_actions`.
        num_proc, cache_dir: as for `chat_dataset`.
    """
    pipeline = ChatPipeline(tokenizer, options)
    dataset, json_column = opened
    sparse = json_column is None
    encode = _Encode(pipeline, json_column, sparse, options.loss_weights, actions)
    rows = first_rows(dataset, json_column, _SAMPLE)
    known = _check_first(pipeline, rows, sparse, actions, options)
    if isinstance(dataset, datasets.IterableDataset):
        return _stream(dataset, encode)
    mapped = dataset.map(
        encode,
        batched=True,
        batch_size=_BATCH,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=encode.features(notes=True),
        num_proc=num_proc,
        desc="Encoding conversations",
        **_cache((_VERSION, dataset._fingerprint, pipeline.identity, repr(options)), cache_dir),
    )
    return _finish(mapped, options, actions, known)


class _Encode:
    """The function that `datasets.map` calls with a batch of columns and the rows' numbers."""

    def __init__(
        self,
        pipeline: ChatPipeline,
        json_column: str | None,
        sparse: bool,
        loss_weights: bool,
        actions: Mapping[str, str],
    ) -> None:
        self._pipeline, self._json_column, self._sparse = pipeline, json_column, sparse
        self._loss_weights, self._actions = loss_weights, actions
        self._warned: set[str] = set()

    def features(self, notes: bool) -> datasets.Features:
        """The columns; ``notes`` are those that counts are made of."""
        ids = datasets.List(datasets.Value("int32"))
        columns = {"input_ids": ids, "labels": ids, "length": datasets.Value("int32")}
        if self._loss_weights:
            columns["loss_weights"] = datasets.List(datasets.Value("float32"))
        if notes:
            columns |= {name: datasets.Value("int64") for name in _NOTES}
        return datasets.Features(columns)

    def __call__(self, batch: Mapping[str, Sequence[Any]], numbers: Sequence[int]) -> pa.Table:
        """All samples of the rows, also those that are dropped, with notes."""
        # Each sample is ten objects, which the garbage collector looks at again and again for as
        # long as they live, so a part becomes arrays before the next one.
        parts = [self._with_notes(samples) for samples in self._encode(batch, numbers)]
        return pa.concat_tables(parts or [self._with_notes([])])

    def stream(self, batch: Mapping[str, Sequence[Any]], numbers: Sequence[int]) -> dict[str, Any]:
        """The samples that are kept. Warns once about each problem, or raises it."""
        samples = [sample for part in self._encode(batch, numbers) for sample in part]
        report = ChatReport(rows=len(numbers))
        count_samples(samples, report)
        act(report, self._actions, self._warned)
        self._warned |= {name for name, count in report.problems.items() if count}
        table = pa.table(self._columns([each for each in samples if each.kept]))
        return {name: table[name].to_pylist() for name in table.column_names}

    def _encode(
        self, batch: Mapping[str, Sequence[Any]], numbers: Sequence[int]
    ) -> Iterator[list[Sample]]:
        rows = zip(numbers, rows_of(batch, self._json_column, numbers))
        given = ((number, row) for number, row in rows if row is not None)
        return self._pipeline.encode_parts(given, sparse=self._sparse)

    def _with_notes(self, samples: Sequence[Sample]) -> pa.Table:
        notes = [
            (
                each.row,
                each.kept,
                each.flags,
                each.cut_messages,
                each.cut_tokens,
                each.encoded.targets,
            )
            for each in samples
        ]
        arrays = np.array(notes, np.int64).reshape(-1, len(_NOTES)).T
        return pa.table({**self._columns(samples), **dict(zip(_NOTES, arrays))})

    def _columns(self, samples: Sequence[Sample]) -> dict[str, pa.Array]:
        lengths = np.array([len(each.encoded.ids) for each in samples], np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        encoded = [each.encoded for each in samples]
        columns = {
            "input_ids": _lists([each.ids for each in encoded], offsets, np.int32),
            "labels": _lists([each.labels for each in encoded], offsets, np.int32),
            "length": pa.array(lengths),
        }
        if self._loss_weights:
            weights = [each.weights for each in encoded]
            columns["loss_weights"] = _lists(weights, offsets, np.float32)
        return columns


def _lists(arrays: list[Any], offsets: Any, dtype: Any) -> pa.ListArray:
    values = np.concatenate(arrays) if arrays else np.empty(0, dtype)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _check_first(
    pipeline: ChatPipeline,
    rows: Iterable[Any],
    sparse: bool,
    actions: Mapping[str, str],
    options: ChatOptions,
) -> set[str]:
    """Check the first rows. Returns the checks that found a problem."""
    given = ((number, row) for number, row in enumerate(rows) if row is not None)
    samples = pipeline.encode(given, sparse=sparse)
    report = ChatReport(rows=len({each.row for each in samples}))
    count_samples(samples, report)
    if options.max_length is not None:
        count_padding(report, options.max_length)
    act(report, actions)
    return {name for name, count in report.problems.items() if count}


def _stream(dataset: Any, encode: _Encode) -> Any:
    return dataset.map(
        encode.stream,
        batched=True,
        batch_size=_BATCH,
        with_indices=True,
        remove_columns=columns_of(dataset),
        features=encode.features(notes=False),
    )


def _cache(key: tuple[Any, ...], cache_dir: Any) -> dict[str, Any]:
    """The fingerprint of the result, and its file."""
    given: dict[str, Any] = {"new_fingerprint": Hasher.hash(key)}
    if cache_dir is not None:
        folder = Path(cache_dir)
        folder.mkdir(parents=True, exist_ok=True)
        given["cache_file_name"] = str(folder / f"chat-{given['new_fingerprint']}.arrow")
    return given


def _finish(
    mapped: datasets.Dataset,
    options: ChatOptions,
    actions: Mapping[str, str],
    known: set[str],
) -> datasets.Dataset:
    """Count, check, and leave out the samples that are dropped."""
    notes = {name: mapped.data.column(name).to_numpy() for name in _NOTES}
    lengths = mapped.data.column("length").to_numpy()
    kept = notes["_kept"].astype(bool)
    report = ChatReport(
        rows=len(np.unique(notes["_row"])),  # each row has at least one sample
        samples=int(kept.sum()),
        dropped=int((~kept).sum()),
        cut_messages=int(notes["_cut_messages"].sum()),
        cut_tokens=int(notes["_cut_tokens"].sum()),
        tokens=int(lengths[kept].sum()),
        targets=int(notes["_targets"][kept].sum()),
    )
    for at, name in enumerate(CHECKS):
        has = notes["_flags"] >> at & 1 == 1
        if has.any():
            report.problems[name] = int(has.sum())
            report.first_rows[name] = int(notes["_row"][has][0])
    if options.max_length is not None:
        count_padding(report, options.max_length)
    act(report, actions, known)
    if not report.samples:
        raise ValueError(f"source must have a row that can be learned from, got none: {report}")
    if report.dropped:
        mapped = mapped.select(np.flatnonzero(kept))
    dataset = mapped.remove_columns(list(_NOTES)).with_format(None)  # of the source's transform
    dataset.chat_report = report
    return dataset
