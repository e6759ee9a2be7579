"""``tokenpack shards``: write, inspect, merge and convert token shards."""

from __future__ import annotations

import argparse
import sys

from ..data.shards.file import ShardFile, as_token_dtype
from ..data.shards.formats import open_shard, resolve_paths
from ..data.shards.merge import (
    convert_shards,
    merge_shards,
    read_about,
    tokens_alone,
    verify_file,
)
from ..data.shards.shards import TokenShards
from ..table import format_table
from .arguments import template_of


def run(arguments: argparse.Namespace) -> int:
    """Run one of the actions. Returns 0; bad input raises."""
    action = {"write": _write, "info": _info, "merge": _merge, "convert": _convert}
    action[arguments.action](arguments)
    return 0


def _write(arguments: argparse.Namespace) -> None:
    from ..data.shards.write import write_shards

    tokenizer = None
    if arguments.tokenizer is not None:
        from .tokenizer import load_pretrained  # imports transformers, which is slow

        tokenizer = load_pretrained(arguments.tokenizer)
    elif arguments.chat:
        raise ValueError("--tokenizer must be given with --chat")
    inputs = arguments.input
    try:
        report = write_shards(
            inputs if len(inputs) > 1 else inputs[0],
            arguments.out,
            tokenizer,
            format=arguments.format,
            dtype=arguments.dtype,
            column=arguments.column,
            bos=arguments.bos,
            eos=arguments.eos,
            chat=arguments.chat,
            template=template_of(arguments.template),
            max_length=arguments.max_length,
            num_proc=arguments.num_proc,
            rank=arguments.rank,
            world_size=arguments.world_size,
            progress=True,
        )
    except (KeyboardInterrupt, OSError):
        print("\nrun the same command again to go on from the last checkpoint", file=sys.stderr)
        raise
    skipped = f", {report.skipped:,} rows without tokens" if report.skipped else ""
    speed = report.new_tokens / max(report.seconds, 1e-9)
    print(
        f"{report.path}: {report.tokens:,} tokens in {report.documents:,} documents{skipped}; "
        f"{report.new_tokens:,} tokens in {report.seconds:,.1f} s, {speed:,.0f} tokens/s"
    )


def _info(arguments: argparse.Namespace) -> None:
    dtype = None if arguments.dtype is None else as_token_dtype("--dtype", arguments.dtype)
    paths = tokens_alone(resolve_paths(arguments.input))
    files = [open_shard(path, dtype) for path in paths]
    headers = ["file", "format", "dtype", "tokens", "documents", "mean", "longest", "mask"]
    headers += ["smallest id", "largest id"] if arguments.verify else []
    rows = [_described(file, arguments.verify) for file in files]
    if len(files) > 1:
        total = [f"{sum(file.num_tokens for file in files):,}"]
        documents = [len(file.ends) for file in files if file.ends is not None]
        total.append(f"{sum(documents):,}" if len(documents) == len(files) else "-")
        rows.append(["all", "", "", *total, *[""] * (len(headers) - 5)])
    print(format_table(headers, rows))


def _described(file: ShardFile, verify: bool) -> list[str]:
    about = read_about(file)
    cells = [str(file.path), file.format, file.tokens.dtype.name, f"{file.num_tokens:,}"]
    if file.ends is None:
        cells += ["-", "-", "-"]
    else:
        lengths = TokenShards(file.path).lengths if len(file.ends) else None
        mean = "-" if lengths is None else f"{lengths.mean():,.1f}"
        longest = "-" if lengths is None else f"{lengths.max():,}"
        cells += [f"{len(file.ends):,}", mean, longest]
    cells.append("no" if file.mask is None else "yes")
    if verify:
        low, high = verify_file(file, about)
        cells += [f"{low:,}", f"{high:,}"]
    return cells


def _merge(arguments: argparse.Namespace) -> None:
    _print_written(
        merge_shards(arguments.input, arguments.out, format=arguments.format, progress=True)
    )


def _convert(arguments: argparse.Namespace) -> None:
    written = convert_shards(
        arguments.input,
        arguments.out,
        arguments.format,
        dtype=arguments.dtype,
        source_dtype=arguments.source_dtype,
        bos_token_id=arguments.bos_token_id,
        eos_token_id=arguments.eos_token_id,
        one_document=arguments.one_document,
        progress=True,
    )
    _print_written(written)


def _print_written(shards: TokenShards) -> None:
    (file,) = shards.files
    print(f"{file.path}: {shards.num_tokens:,} tokens in {len(shards):,} documents")
