"""Parquet files, and Arrow IPC files and streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from .files import DataFile
from .schema import Reading

_PARQUET_BUFFER_BYTES = 1 << 20
_PARQUET_BATCH_ROWS = 4096
_END_OF_ARROW_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_parquet(file: DataFile, reading: Reading) -> Iterator[pa.Table]:
    """The rows of a Parquet file. Row groups that are to be skipped are not read."""
    # Some writers put the whole file into one row group. With a buffer and without prefetching, the
    # group is never in memory as a whole.
    with pa.parquet.ParquetFile(
        file.path,
        pre_buffer=False,
        buffer_size=_PARQUET_BUFFER_BYTES,
        page_checksum_verification=True,  # of pages that have one
    ) as source:
        reading.declare(file, source.schema_arrow.names)
        reading.fit(_selected(source.schema_arrow.empty_table(), reading), file.path)
        for group in range(source.num_row_groups):
            declared = source.metadata.row_group(group).num_rows
            if reading.skips(declared):
                continue
            rows = 0
            for batch in source.iter_batches(
                _PARQUET_BATCH_ROWS, row_groups=[group], columns=reading.columns
            ):
                rows += batch.num_rows
                yield reading.fit(_checked_table(batch, reading), file.path)
            if rows != declared:
                raise ValueError(
                    f"{file.path}: row group {group} must have {declared} rows, pyarrow reads "
                    f"{rows}: the file is damaged, or pyarrow {pa.__version__} loses rows of its "
                    "pages; write it with data_page_version='1.0'"
                )


def read_arrow(file: DataFile, reading: Reading) -> Iterator[pa.Table]:
    """The rows of an Arrow IPC file or stream, memory-mapped, one record batch at a time."""
    with pa.memory_map(file.path) as source:
        is_stream = not source.read(6).startswith(b"ARROW1")
        if is_stream:
            _check_end_of_stream(source, file)
        names = _open_ipc(source, is_stream, None).schema.names
        reading.declare(file, names)
        wanted = None if reading.columns is None else [names.index(n) for n in reading.columns]
        reader = _open_ipc(source, is_stream, wanted)
        reading.fit(_selected(reader.schema.empty_table(), reading), file.path)
        for batch in (
            reader if is_stream else map(reader.get_batch, range(reader.num_record_batches))
        ):
            # The file is memory-mapped, so skipping a batch reads little more than its metadata.
            if not reading.skips(batch.num_rows):
                yield reading.fit(_checked_table(batch, reading), file.path)
        if is_stream and source.tell() < source.size():
            raise ValueError(
                f"{file.path}: an Arrow stream ends at byte {source.tell()} of {source.size()}; "
                "write streams that follow one another to files of their own"
            )


def _check_end_of_stream(source: pa.MemoryMappedFile, file: DataFile) -> None:
    """Reject a stream without an end mark. pyarrow accepts a stream cut between two batches."""
    source.seek(max(source.size() - len(_END_OF_ARROW_STREAM), 0))
    if source.read() != _END_OF_ARROW_STREAM:
        raise ValueError(f"{file.path}: truncated: an Arrow stream without an end mark")


def _open_ipc(source: pa.MemoryMappedFile, is_stream: bool, fields: list[int] | None) -> Any:
    source.seek(0)
    options = pa.ipc.IpcReadOptions(**({} if fields is None else {"included_fields": fields}))
    opener = pa.ipc.open_stream if is_stream else pa.ipc.open_file
    return opener(source, options=options)


def _checked_table(batch: pa.RecordBatch, reading: Reading) -> pa.Table:
    # The offsets of a damaged file can point anywhere, and a conversion would read from there.
    batch.validate(full=True)
    return _selected(pa.Table.from_batches([batch]), reading)


def _selected(table: pa.Table, reading: Reading) -> pa.Table:
    return table if reading.columns is None else table.select(reading.columns)
