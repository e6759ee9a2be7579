"""Join shards, and convert them from one format to another.

Tokens are copied in blocks, so memory holds a block and the documents' lengths. Parts that
`write_shards` wrote for several ranks are joined only if they are all there, of one run, and if
their bytes are those that were written.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .datatrove import companion
from .file import ShardError, ShardFile, as_token_dtype, bytes_of
from .formats import resolve_paths
from .shards import TokenShards
from .writer import FORMATS, ShardWriter, about_name

_BLOCK = 1 << 22  # tokens that are copied at once
_COMPANIONS = (".idx", ".index", ".loss", ".metadata", ".tokenpack.json")


def merge_shards(
    paths: Any, out: str | os.PathLike[str], *, format: str | None = None, progress: bool = False
) -> TokenShards:
    """Join shards of one dtype, one after the other, and verify the result.

    Parts of several ranks are put in the order of the ranks. Then the result is the same bytes as
    if one rank had written it.

    Args:
        paths: as for `TokenShards`. Files that belong to a file of tokens may be listed too.
        out: the name of the files.
        format: ``"megatron"`` or ``"datatrove"``; by default that of the shards.
        progress: show a progress bar.

    Returns:
        The shards that were written.

    Raises:
        ValueError: if dtypes, formats or tokenizers differ, a part is missing, given twice or
            damaged, a file does not store the ends of documents, or files of the name exist.
    """
    shards = TokenShards(tokens_alone(resolve_paths(paths)))
    abouts = [read_about(file) for file in shards.files]
    order = _rank_order(shards.files, abouts)
    if order is not None:
        shards = TokenShards([shards.files[at].path for at in order])
        abouts = [abouts[at] for at in order]
    dtypes = {file.tokens.dtype for file in shards.files}
    if len(dtypes) > 1:
        raise ValueError(
            f"paths must hold tokens of one dtype to be merged, got "
            f"{', '.join(sorted(each.name for each in dtypes))}; convert them first"
        )
    _require_one_tokenizer(shards.files, abouts)
    if format is None:
        formats = {file.format for file in shards.files}
        (format,) = formats if len(formats) == 1 else ("",)
        if format not in FORMATS:
            raise ValueError(
                f"format must be given to merge files of {', '.join(sorted(formats))}: "
                f"{' or '.join(FORMATS)}"
            )
    return _copy(shards, abouts, out, format, shards.dtype, progress)


def convert_shards(
    paths: Any,
    out: str | os.PathLike[str],
    format: str,
    *,
    dtype: Any = None,
    source_dtype: Any = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    one_document: bool = False,
    progress: bool = False,
) -> TokenShards:
    """Write shards of any format as Megatron's or datatrove's.

    Args:
        paths: as for `TokenShards`.
        out: the name of the files.
        format: ``"megatron"`` or ``"datatrove"``.
        dtype: of the new tokens. By default that of the old ones, or the next one that the format
            has; ids that do not fit are an error.
        source_dtype, bos_token_id, eos_token_id: for files that do not state their dtype or the
            ends of documents; see `TokenShards`.
        one_document: write files without ends of documents as one document.
        progress: show a progress bar.

    Returns:
        The shards that were written.

    Raises:
        ValueError: if an argument is wrong, a file does not store the ends of documents, an id does
            not fit into the dtype, or files of the name exist.
    """
    shards = TokenShards(
        tokens_alone(resolve_paths(paths)),
        dtype=source_dtype,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    abouts = [read_about(file) for file in shards.files]
    new = _dtype_in(format, shards.dtype) if dtype is None else as_token_dtype("dtype", dtype)
    return _copy(shards, abouts, out, format, new, progress, one_document)


def read_about(file: ShardFile) -> dict[str, Any] | None:
    """What tokenpack wrote next to the tokens; None if there is nothing.

    Raises:
        ShardError: if it is damaged.
    """
    path = about_name(file.path.with_suffix(""))
    if file.format not in FORMATS or not path.is_file():
        return None
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        known = {"tokens", "crc32", "key", "position"} <= set(about)
    except ValueError:
        known = False
    if not known:
        raise ShardError(f"{path} must be what tokenpack wrote next to the tokens; remove it")
    return about


def verify_file(file: ShardFile, about: dict[str, Any] | None) -> tuple[int, int]:
    """Read all tokens of a file.

    Returns:
        The smallest and the largest id; ``(0, -1)`` if there is none.

    Raises:
        ShardError: if they are not what tokenpack wrote.
    """
    crc, low, high = 0, None, -1
    for first in range(0, file.num_tokens, _BLOCK):
        block = file.tokens.array[first : first + _BLOCK]
        crc = zlib.crc32(bytes_of(block), crc)
        low = int(block.min()) if low is None else min(low, int(block.min()))
        high = max(high, int(block.max()))
    if about is not None and (about["tokens"], about["crc32"]) != (file.num_tokens, crc):
        raise ShardError(
            f"{file.path} must hold the {about['tokens']:,} tokens that were written, with the "
            f"checksum {about['crc32']}, got {file.num_tokens:,} with {crc}: it is damaged"
        )
    return low or 0, high


def _copy(
    shards: TokenShards,
    abouts: Sequence[dict[str, Any] | None],
    out: str | os.PathLike[str],
    format: str,
    dtype: np.dtype[Any],
    progress: bool,
    one_document: bool = False,
) -> TokenShards:
    from tqdm import tqdm

    if not shards.has_boundaries and not one_document:
        file = next(each for each in shards.files if each.ends is None)
        raise ValueError(
            f"{file.path} ({file.format}) does not store the ends of documents: give the token "
            "that begins or ends them, or write one document (one_document=True, --one-document)"
        )
    files = [[os.path.abspath(f.path), f.path.stat().st_size] for f in shards.files]
    key = {"_copied": files, "format": format, "dtype": dtype.name, **_common_key(abouts)}
    tokenizers = {_tokenizer_of(each, about) for each, about in zip(shards.files, abouts)}
    name = tokenizers.pop() if len(tokenizers) == 1 else None
    writer = ShardWriter(
        out, format, dtype, mask=shards.has_mask, tokenizer=name or "unknown", key=key
    )
    with writer:
        if not writer.is_finished:
            bar = tqdm(
                **{"total": shards.num_tokens, "desc": "copying", "unit": " tokens"},
                **{"unit_scale": True, "disable": not progress},
            )
            with bar:
                _copy_tokens(shards, abouts, writer, bar)
            writer.end_documents(shards.lengths)
            positions = [about["position"] for about in abouts if about is not None]
            if len(positions) == len(abouts) and all("stop" in each for each in positions):
                skipped = sum(each["skipped"] for each in positions)
                writer.checkpoint(
                    {**positions[-1], "first": positions[0]["first"], "skipped": skipped}
                )
    written = TokenShards(writer.path)
    if (written.num_tokens, len(written)) != (shards.num_tokens, len(shards)):
        raise ShardError(
            f"{writer.path} must hold {shards.num_tokens:,} tokens of {len(shards):,} documents, "
            f"got {written.num_tokens:,} of {len(written):,}"
        )
    return written


def _copy_tokens(shards: TokenShards, abouts: Sequence[Any], writer: ShardWriter, bar: Any) -> None:
    for file, about in zip(shards.files, abouts):
        crc = 0
        for first in range(0, file.num_tokens, _BLOCK):
            block = file.tokens.array[first : first + _BLOCK]
            crc = zlib.crc32(bytes_of(block), crc)
            mask = None if file.mask is None else file.mask.array[first : first + _BLOCK] != 0
            writer.write(block, mask)
            bar.update(len(block))
        if about is not None and (about["tokens"], about["crc32"]) != (file.num_tokens, crc):
            verify_file(file, about)  # raises


def _rank_order(files: Sequence[ShardFile], abouts: Sequence[Any]) -> list[int] | None:
    """The files in the order of their ranks; None if they are not parts of one run.

    Raises:
        ShardError: if some are, but a part is missing, given twice, or of another run.
    """
    keys = [about["key"] if about is not None else {} for about in abouts]
    sizes = {key.get("world_size", 1) for key in keys}
    if sizes == {1}:
        return None
    without_rank = [{n: v for n, v in key.items() if n != "rank"} for key in keys]
    for at, key in enumerate(without_rank):
        if key != without_rank[0]:
            names = {*key, *without_rank[0]}
            differs = sorted(n for n in names if key.get(n) != without_rank[0].get(n))
            raise ShardError(
                f"{files[at].path} must be a part of the same run as {files[0].path}, but they "
                f"differ in {', '.join(differs)}"
            )
    (size,) = sizes
    ranks = [key["rank"] for key in keys]
    if sorted(ranks) != list(range(size)):
        missing = sorted(set(range(size)) - set(ranks))
        twice = sorted({rank for rank in ranks if ranks.count(rank) > 1})
        what = f"{missing} are missing" if missing else f"{twice} are there twice"
        raise ShardError(f"paths must be the parts of all {size} ranks, each once; ranks {what}")
    order = sorted(range(size), key=lambda at: ranks[at])
    for before, after in zip(order, order[1:]):
        end = abouts[before]["position"].get("stop")  # a task of datatrove has no range of rows
        begin = abouts[after]["position"].get("first")
        if end != begin:
            raise ShardError(
                f"{files[after].path} must begin with row {end}, where {files[before].path} ends, "
                f"got {begin}"
            )
    return order


def _common_key(abouts: Sequence[Any]) -> dict[str, Any]:
    """What the parts of one run have in common, as if one rank had written it."""
    keys = [about["key"] for about in abouts if about is not None]
    if len(keys) != len(abouts) or any("encoder" not in key for key in keys):
        return {}
    shared = {"inputs", "column", "encoder"}
    common = {n: v for n, v in keys[0].items() if all(key.get(n) == v for key in keys)}
    if not shared <= set(common):
        return {}
    return {**{name: common[name] for name in sorted(shared)}, "rank": 0, "world_size": 1}


def _require_one_tokenizer(files: Sequence[ShardFile], abouts: Sequence[Any]) -> None:
    encoders = {about["key"].get("encoder") for about in abouts if about is not None} - {None}
    names = {_tokenizer_of(file, about) for file, about in zip(files, abouts)} - {None, "unknown"}
    if len(encoders) > 1 or (len(names) > 1 and not encoders):
        raise ValueError(
            f"paths must hold tokens of one tokenizer, got {', '.join(sorted(map(str, names)))}"
        )


def _tokenizer_of(file: ShardFile, about: Any) -> str | None:
    name = about["tokenizer"] if about is not None else None
    return name or file.details.get("tokenizer")


def _dtype_in(format: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype, or the next one that a format has."""
    if format == "megatron":
        names = {"uint32": "<i4", "uint64": "<i8"}
        return np.dtype(names[dtype.name]) if dtype.name in names else dtype
    if dtype.name in ("uint16", "uint32"):
        return dtype
    return np.dtype("<u2") if dtype.itemsize <= 2 else np.dtype("<u4")


def tokens_alone(paths: Sequence[Path]) -> list[Path]:
    """The paths without the files that belong to a file of tokens that is named too."""
    names = set(paths)
    kept = []
    for path in paths:
        suffix = next((each for each in _COMPANIONS if path.name.endswith(each)), None)
        stem = path.with_name(path.name[: -len(suffix)]) if suffix else path
        tokens = (stem, companion(stem, "bin"), companion(stem, "ds"))
        if suffix is None or not names.intersection(tokens):
            kept.append(path)
    return kept
