"""Data for training: readers, chats, packed batches, datasets and streams, and collators."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat.checks import ChatReport
    from .chat.dataset import chat_dataset
    from .chat.marked import Preview
    from .chat.preview import preview
    from .chat.split import (
        SFTDataConfig,
        from_sft_files,
        from_sft_hf,
        from_sft_json,
        from_sft_strings,
    )
    from .chat.templates import ChatTemplate
    from .collators.denoisers import Denoiser
    from .collators.seq2seq import CappedSeq2SeqCollator
    from .collators.span_corruption import T5SpanCorruptionCollatorFast
    from .packed.batch import PackedBatch, pack_result_to_tensors
    from .packed.collate import collate_packed_rows, packed_collate_fn
    from .packed.dataset import pack_dataset, pack_dataset_from_result
    from .packed.pairs import PackedPairs, pack_pairs_to_tensors
    from .packed.rows import concatenate_and_pack, pack_sequences
    from .packed.stream import PackedStream, PackedStreamLoader, pack_stream
    from .reader import streaming_dataset_reader
    from .shards.blend import BlendedSamples, blend_shards
    from .shards.loader import ShardLoader
    from .shards.merge import convert_shards, merge_shards
    from .shards.pipeline import ShardStep
    from .shards.samples import ShardSamples
    from .shards.shards import TokenShards
    from .shards.simple import (
        DataConfig,
        from_binary,
        from_files,
        from_hf,
        from_npy_split,
        save_binary,
    )
    from .shards.windows import shard_windows
    from .shards.write import write_shards
    from .shards.writer import ShardWriter
    from .tokenizers import byte_tokenizer, train_tokenizer

# Imported on first use, because some of these modules need torch or datasets and others do not.
_HOMES = {
    "BlendedSamples": ".shards.blend",
    "CappedSeq2SeqCollator": ".collators.seq2seq",
    "ChatReport": ".chat.checks",
    "ChatTemplate": ".chat.templates",
    "DataConfig": ".shards.simple",
    "Denoiser": ".collators.denoisers",
    "PackedBatch": ".packed.batch",
    "PackedPairs": ".packed.pairs",
    "PackedStream": ".packed.stream",
    "PackedStreamLoader": ".packed.stream",
    "Preview": ".chat.marked",
    "SFTDataConfig": ".chat.split",
    "ShardLoader": ".shards.loader",
    "ShardSamples": ".shards.samples",
    "ShardStep": ".shards.pipeline",
    "ShardWriter": ".shards.writer",
    "T5SpanCorruptionCollatorFast": ".collators.span_corruption",
    "TokenShards": ".shards.shards",
    "blend_shards": ".shards.blend",
    "byte_tokenizer": ".tokenizers",
    "chat_dataset": ".chat.dataset",
    "collate_packed_rows": ".packed.collate",
    "concatenate_and_pack": ".packed.rows",
    "convert_shards": ".shards.merge",
    "from_binary": ".shards.simple",
    "from_files": ".shards.simple",
    "from_hf": ".shards.simple",
    "from_npy_split": ".shards.simple",
    "from_sft_files": ".chat.split",
    "from_sft_hf": ".chat.split",
    "from_sft_json": ".chat.split",
    "from_sft_strings": ".chat.split",
    "merge_shards": ".shards.merge",
    "pack_dataset": ".packed.dataset",
    "pack_dataset_from_result": ".packed.dataset",
    "pack_pairs_to_tensors": ".packed.pairs",
    "pack_result_to_tensors": ".packed.batch",
    "pack_sequences": ".packed.rows",
    "pack_stream": ".packed.stream",
    "packed_collate_fn": ".packed.collate",
    "preview": ".chat.preview",
    "save_binary": ".shards.simple",
    "shard_windows": ".shards.windows",
    "streaming_dataset_reader": ".reader",
    "train_tokenizer": ".tokenizers",
    "write_shards": ".shards.write",
}

# A literal list, because ruff and mkdocstrings do not evaluate list(_HOMES).
__all__ = [
    "BlendedSamples",
    "CappedSeq2SeqCollator",
    "ChatReport",
    "ChatTemplate",
    "DataConfig",
    "Denoiser",
    "PackedBatch",
    "PackedPairs",
    "PackedStream",
    "PackedStreamLoader",
    "Preview",
    "SFTDataConfig",
    "ShardLoader",
    "ShardSamples",
    "ShardStep",
    "ShardWriter",
    "T5SpanCorruptionCollatorFast",
    "TokenShards",
    "blend_shards",
    "byte_tokenizer",
    "chat_dataset",
    "collate_packed_rows",
    "concatenate_and_pack",
    "convert_shards",
    "from_binary",
    "from_files",
    "from_hf",
    "from_npy_split",
    "from_sft_files",
    "from_sft_hf",
    "from_sft_json",
    "from_sft_strings",
    "merge_shards",
    "pack_dataset",
    "pack_dataset_from_result",
    "pack_pairs_to_tensors",
    "pack_result_to_tensors",
    "pack_sequences",
    "pack_stream",
    "packed_collate_fn",
    "preview",
    "save_binary",
    "shard_windows",
    "streaming_dataset_reader",
    "train_tokenizer",
    "write_shards",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
