"""Files of token shards, written byte by byte from the formats' published layouts."""

import gzip
import struct

import numpy as np


def megatron(prefix, documents, code=8, dtype="<u2", modes=False):
    """``documents`` are lists of sequences."""
    sequences = [sequence for document in documents for sequence in document]
    size = np.dtype(dtype).itemsize
    firsts = np.cumsum([0, *(len(document) for document in documents)])
    lengths = [len(sequence) for sequence in sequences]
    starts = np.cumsum([0, *lengths])[:-1] * size
    idx = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(firsts))
    idx += np.array(lengths, "<i4").tobytes() + starts.astype("<i8").tobytes()
    idx += firsts.astype("<i8").tobytes() + (bytes(len(sequences)) if modes else b"")
    prefix.with_name(prefix.name + ".idx").write_bytes(idx)
    tokens = b"".join(np.array(sequence, dtype).tobytes() for sequence in sequences)
    prefix.with_name(prefix.name + ".bin").write_bytes(tokens)
    return prefix


def datatrove(path, documents, dtype="<u2", loss=None, index=True, metadata=True):
    path.write_bytes(b"".join(np.array(document, dtype).tobytes() for document in documents))
    ends = np.cumsum([len(document) for document in documents])
    if index:
        path.with_name(path.name + ".index").write_bytes(ends.astype("<u8").tobytes())
    if loss is not None:
        path.with_name(path.name + ".loss").write_bytes(bytes(loss))
    if metadata:
        size = np.dtype(dtype).itemsize
        path.with_name(path.name + ".metadata").write_text(f"gpt2|{size}\n{ends[-1]}\n1 T")
    return path


def llmc(path, tokens, magic=20240520, version=1, dtype="<u2"):
    header = struct.pack("<3i", magic, version, len(tokens)).ljust(1024, b"\0")
    path.write_bytes(header + np.array(tokens, dtype).tobytes())
    return path


def olmo(path, documents, dtype="<u4"):
    path.write_bytes(b"".join(np.array(document, dtype).tobytes() for document in documents))
    start = 0
    with gzip.open(path.with_suffix(".csv.gz"), "wt") as file:
        for document in documents:
            file.write(f"{start},{start + len(document)},id,a.jsonl.gz,1\n")
            start += len(document)
    return path


def raw(path, tokens, dtype="<u2"):
    path.write_bytes(np.array(tokens, dtype).tobytes())
    return path
