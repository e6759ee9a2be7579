"""Each format is read as its layout says, and a damaged file is an error that names it."""

import pickle

import numpy as np
import pytest

from tokenpack.data import TokenShards

from . import layouts

DOCUMENTS = [[5], [1, 2, 3], [], [60000, 7, 7, 7], [9, 9]]
FLAT = [token for document in DOCUMENTS for token in document]


def written(folder, kind):
    """A file of `DOCUMENTS` in each format that stores their ends."""
    if kind.startswith("megatron"):
        code, dtype = {"8": (8, "<u2"), "4": (4, "<i4"), "5": (5, "<i8")}[kind[-1]]
        sequences = [[document] for document in DOCUMENTS]
        return layouts.megatron(folder / kind, sequences, code, dtype)
    if kind.startswith("datatrove"):
        return layouts.datatrove(folder / "a.ds", DOCUMENTS, {"2": "<u2", "4": "<u4"}[kind[-1]])
    return layouts.olmo(folder / "a.npy", DOCUMENTS)


KINDS = ("megatron 8", "megatron 4", "megatron 5", "datatrove 2", "datatrove 4", "olmo")


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_format_that_stores_their_ends(tmp_path, kind):
    shards = TokenShards(written(tmp_path, kind))
    assert [document.tolist() for document in shards] == DOCUMENTS
    assert shards.lengths.tolist() == list(map(len, DOCUMENTS))
    assert shards.has_boundaries
    assert shards.files[0].format == kind.split()[0]
    again = pickle.loads(pickle.dumps(shards))
    assert [document.tolist() for document in again] == DOCUMENTS
    assert not shards[1].flags.writeable


def test_megatron_documents_of_several_sequences_with_modes(tmp_path):
    documents = [[[1, 2], [3]], [[4]], [[], [5, 6]]]
    prefix = layouts.megatron(tmp_path / "a", documents, modes=True)
    for name in ("a", "a.bin", "a.idx"):
        assert [each.tolist() for each in TokenShards(tmp_path / name)] == [[1, 2, 3], [4], [5, 6]]
    assert TokenShards(prefix).files[0].details == {"sequences": 5, "modes": True}


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({}, "uint16"), ({"magic": 20240801, "version": 7, "dtype": "<u4"}, "u4")],
)
def test_llmc_files_continue_a_document_in_the_next_file(tmp_path, options, dtype):
    layouts.llmc(tmp_path / "a.bin", [50, 1, 2, 50, 3], **options)
    layouts.llmc(tmp_path / "b.bin", [4, 50, 5], **options)
    shards = TokenShards(tmp_path, bos_token_id=50)
    assert [each.tolist() for each in shards] == [[50, 1, 2], [50, 3, 4], [50, 5]]
    assert shards.dtype == dtype
    assert len(TokenShards(tmp_path)) == 1
    assert not TokenShards(tmp_path).has_boundaries


def test_the_end_of_a_document_by_its_last_token(tmp_path):
    layouts.raw(tmp_path / "a.bin", [1, 0, 2])
    np.save(tmp_path / "b.npy", np.array([3, 0], np.int32))
    shards = TokenShards(tmp_path, dtype="uint16", eos_token_id=0)
    assert [each.tolist() for each in shards] == [[1, 0], [2, 3, 0]]
    assert shards.dtype == np.int32


def test_files_of_several_formats_are_one_stream(tmp_path):
    paths = []
    for kind in KINDS:
        folder = tmp_path / kind
        folder.mkdir()
        paths.append(written(folder, kind))
    paths.insert(2, layouts.llmc(tmp_path / "c.bin", [1, 2]))
    shards = TokenShards(paths)
    expected = DOCUMENTS * 2 + [[1, 2]] + DOCUMENTS * 4
    assert [each.tolist() for each in shards] == expected
    assert shards[-1].tolist() == DOCUMENTS[-1]
    stream = [token for document in expected for token in document]
    ends = sorted({0, *np.cumsum(list(map(len, expected))).tolist()})
    rng = np.random.default_rng(0)
    for start, stop in np.sort(rng.integers(0, len(stream) + 1, (200, 2))).tolist():
        assert shards.tokens(start, stop).tolist() == stream[start:stop]
        inside = [end for end in ends if start < end < stop]
        assert shards.ends_between(start, stop).tolist() == inside
    with pytest.raises(IndexError, match="from 0 to 62"):
        shards.tokens(0, 63)


def test_ends_are_found_where_one_block_of_them_is_not_enough(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenpack.data.shards.columns._BLOCK", 3)
    lengths = np.random.default_rng(1).integers(0, 4, 60)
    shards = TokenShards(layouts.datatrove(tmp_path / "a.ds", [[1] * n for n in lengths]))
    ends = np.cumsum(lengths)
    for start in range(0, shards.num_tokens - 5):
        for stop in (start + 1, start + 5, shards.num_tokens):
            inside = np.unique(ends[(ends > start) & (ends < stop)])
            assert shards.ends_between(start, stop).tolist() == inside.tolist()


def test_masks_of_the_loss(tmp_path):
    loss = [1, 0, 0, 1, 1, 0, 1, 1, 1, 0]
    path = layouts.datatrove(tmp_path / "a.ds", DOCUMENTS, loss=loss)
    shards = TokenShards(path)
    assert shards.targets(2, 9).tolist() == [bool(each) for each in loss[2:9]]
    mask = tmp_path / "mask"
    mask.write_bytes(bytes(loss))
    npy = tmp_path / "b.npy"
    np.save(npy, FLAT)
    assert TokenShards(npy, label_masks=[mask]).targets(0, 10).tolist() == list(map(bool, loss))
    assert TokenShards(npy).targets(0, 10) is None
    mask.write_bytes(bytes(loss[1:]))
    with pytest.raises(ValueError, match="mask must have one byte for each of 10 tokens, got 9"):
        TokenShards(npy, label_masks=[mask])
    with pytest.raises(
        ValueError, match="label_masks must be a list with a file for each of the 1"
    ):
        TokenShards(npy, label_masks=[])


def cut(path, size=1):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - size])


def overwrite(path, at, content):
    old = path.read_bytes()
    path.write_bytes(old[:at] + content + old[at + len(content) :])


DAMAGE = {
    "megatron .bin cut": (
        "megatron 8",
        lambda f: cut(f / "megatron 8.bin"),
        "bin must have 20 byt",
    ),
    "megatron .bin gone": (
        "megatron 8",
        lambda f: (f / "megatron 8.bin").unlink(),
        "existing file",
    ),
    "megatron .idx cut": (
        "megatron 8",
        lambda f: cut(f / "megatron 8.idx"),
        "idx must have 142 by",
    ),
    "megatron .idx of a float": (
        *("megatron 8", lambda f: overwrite(f / "megatron 8.idx", 17, b"\6")),
        "idx must be an index of integers, got float64",
    ),
    "megatron version": (
        *("megatron 8", lambda f: overwrite(f / "megatron 8.idx", 9, b"\2")),
        "must be of version 1, got 2",
    ),
    "megatron length": (
        *("megatron 8", lambda f: overwrite(f / "megatron 8.idx", 38, b"\4")),
        "sequence 2 must begin at byte 10",
    ),
    "megatron documents": (
        *("megatron 8", lambda f: overwrite(f / "megatron 8.idx", 34 + 60 + 8, b"\3")),
        "document indices must not decrease, but entry 2 does",
    ),
    "datatrove .ds cut": (
        "datatrove 2",
        lambda f: cut(f / "a.ds", 2),
        "ds must have 20 bytes for 10",
    ),
    "datatrove .index cut": (
        *("datatrove 2", lambda f: cut(f / "a.ds.index", 8)),
        "index must end at 10, as a.ds.metadata says",
    ),
    "datatrove .index cut within": (
        *("datatrove 2", lambda f: cut(f / "a.ds.index")),
        "multiple of 8 bytes, got 39",
    ),
    "datatrove .index order": (
        *("datatrove 2", lambda f: overwrite(f / "a.ds.index", 8, b"\0")),
        "ends of documents must not decrease, but entry 1 does",
    ),
    "datatrove .metadata": (
        *("datatrove 2", lambda f: (f / "a.ds.metadata").write_text("gpt2\n10")),
        "metadata must be 'TOKENIZER|BYTES PER TOKEN'",
    ),
    "olmo tokens cut": ("olmo", lambda f: cut(f / "a.npy", 4), "must have 1, 2, 4 or 8 bytes"),
    "olmo table cut": ("olmo", lambda f: cut(f / "a.csv.gz", 12), "must have 'start,end'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_on_opening(tmp_path, name):
    kind, damage, message = DAMAGE[name]
    path = written(tmp_path, kind)
    TokenShards(path)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TokenShards(path)


def test_other_files_that_are_cut_short_or_are_no_tokens(tmp_path):
    path = layouts.llmc(tmp_path / "a.bin", [1, 2, 3])
    cut(path)
    with pytest.raises(
        ValueError, match=r"a.bin must have 1,030 bytes for the 3 tokens of its head"
    ):
        TokenShards(path)
    np.save(tmp_path / "b.npy", np.arange(4))
    cut(tmp_path / "b.npy")
    with pytest.raises(ValueError, match=r"b.npy must have 32 bytes after its header, got 31"):
        TokenShards(tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match="one row of integers, got float64 of shape"):
        TokenShards(tmp_path / "c.npy")
    (tmp_path / "d.idx").write_bytes(b"TNTIDX\0\0" + bytes(30))
    with pytest.raises(ValueError, match="must begin with"):
        TokenShards(tmp_path / "d.idx")


def test_a_dtype_is_not_guessed(tmp_path):
    path = layouts.raw(tmp_path / "a.bin", FLAT)
    with pytest.raises(ValueError, match=r"dtype must be given for .*a.bin, which has no header"):
        TokenShards(path)
    assert TokenShards(path, dtype="uint16")[0].tolist() == FLAT
    cut(path)
    with pytest.raises(ValueError, match="cut short or is not of uint16"):
        TokenShards(path, dtype="uint16")
    with pytest.raises(ValueError, match="dtype must be a dtype of integers"):
        TokenShards(path, dtype="float32")
    with pytest.raises(ValueError, match="must not be given together"):
        TokenShards(path, dtype="uint16", bos_token_id=1, eos_token_id=2)


def test_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ends in .bin .ds .npy"):
        TokenShards(tmp_path)
    with pytest.raises(FileNotFoundError, match="at least one file of tokens"):
        TokenShards(tmp_path / "*.bin")
    with pytest.raises(FileNotFoundError, match="existing files"):
        TokenShards(tmp_path / "a.ds")
    with pytest.raises(ValueError, match="empty list"):
        TokenShards([])
    with pytest.raises(TypeError, match="a path or a list of paths"):
        TokenShards(3)
    layouts.datatrove(tmp_path / "b.ds", [[1]])
    layouts.megatron(tmp_path / "a", [[[2]]])
    layouts.datatrove(tmp_path / ".hidden.ds", [[3]])
    assert [each.tolist() for each in TokenShards(tmp_path)] == [[2], [1]]
    assert [each.tolist() for each in TokenShards(tmp_path / "*")] == [[2], [1]]
    assert [each.tolist() for each in TokenShards([tmp_path / "b.ds", tmp_path])] == [[1], [2], [1]]


def test_a_file_without_tokens(tmp_path):
    path = layouts.datatrove(tmp_path / "a.ds", [[]], metadata=False)
    shards = TokenShards([path, layouts.datatrove(tmp_path / "b.ds", [[1]])])
    assert [each.tolist() for each in shards] == [[], [1]]
    assert shards.ends_between(0, 1).tolist() == []
