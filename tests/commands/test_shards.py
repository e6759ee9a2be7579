"""`tokenpack shards`: write with resume and ranks, info, merge, convert."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from tokenpack.cli import main
from tokenpack.data import TokenShards, train_tokenizer
from tokenpack.data.shards import encode, write
from tokenpack.data.shards.encode import TextEncoder
from tokenpack.data.shards.write import write_shards

from ..data.shards import layouts

WORDS = "the cat sat on a mat, and Là-bas 猫 was: 42 times 🎉 warm.\n\n  Then it left\n".split(" ")  # noqa: SIM905
RNG = np.random.default_rng(0)
TEXTS = ["", *(" ".join(RNG.choice(WORDS, n)) for n in RNG.integers(1, 60, 300)), ""]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def files(path, *suffixes):
    return [path.with_name(path.name + suffix).read_bytes() for suffix in suffixes]


def test_write_info_merge_and_convert(data, folder, tokenizer, tmp_path, capsys):
    out = tmp_path / "one"
    common = ["shards", "write", str(data)]
    assert main([*common, str(out), "--tokenizer", folder, "--num-proc", "2"]) == 0
    expected = [
        [*tokenizer(t, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        for t in TEXTS
        if t
    ]
    assert [each.tolist() for each in TokenShards(out)] == expected
    total = sum(map(len, expected))
    assert (
        f"one.bin: {total:,} tokens in {len(expected)} documents, {302 - len(expected)} rows "
        f"without tokens; {total:,}" in capsys.readouterr().out
    )
    assert main([*common, str(out), "--tokenizer", folder]) == 2
    assert "exists; remove it first" in capsys.readouterr().err
    for rank in (2, 0, 1):
        ranks = ["--rank", str(rank), "--world-size", "3"]
        assert main([*common, str(tmp_path / "part"), "--tokenizer", folder, *ranks]) == 0
    parts = sorted(map(str, tmp_path.glob("part-0*")))  # all suffixes, as a shell lists them
    assert main(["shards", "merge", *parts, str(tmp_path / "merged")]) == 0
    suffixes = (".bin", ".idx", ".tokenpack.json")
    assert files(tmp_path / "merged", *suffixes) == files(out, *suffixes)
    bin_file = str(tmp_path / "merged.bin")
    arguments = [bin_file, str(tmp_path / "d"), "--format", "datatrove", "--dtype", "uint32"]
    assert main(["shards", "convert", *arguments]) == 0
    assert [each.tolist() for each in TokenShards(tmp_path / "d.ds")] == expected
    capsys.readouterr()
    assert main(["shards", "info", bin_file, str(tmp_path / "d.ds"), "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    ids = [token for document in expected for token in document]
    longest = max(map(len, expected))
    for line, kind in zip(lines[2:4], (("megatron", "uint16"), ("datatrove", "uint32"))):
        cells = line.split()[1:]
        mean = f"{total / len(expected):,.1f}"
        assert cells == [
            *kind,
            f"{total:,}",
            f"{len(expected)}",
            mean,
            str(longest),
            "no",
            f"{min(ids)}",
            f"{max(ids)}",
        ]
    assert lines[4].split() == ["all", f"{2 * total:,}", f"{2 * len(expected)}"]


def test_parts_that_do_not_belong_together(data, tokenizer, tmp_path):
    from tokenpack.data.shards.merge import merge_shards

    for name, options in (("a", {}), ("b", {"bos": True})):
        for rank in range(2):
            write_shards(data, tmp_path / name, tokenizer, rank=rank, world_size=2, **options)
    a0, a1, b1 = (tmp_path / f"{n}-0000{r}-of-00002.bin" for n, r in (("a", 0), ("a", 1), ("b", 1)))
    with pytest.raises(ValueError, match=r"all 2 ranks, each once; ranks \[1\] are missing"):
        merge_shards([a0], tmp_path / "m")
    with pytest.raises(ValueError, match=r"ranks \[0\] are there twice"):
        merge_shards([a0, a1, a0], tmp_path / "m")
    with pytest.raises(
        ValueError, match=r"same run as .*a-00000-of-00002.bin, .* differ in encoder"
    ):
        merge_shards([a0, b1], tmp_path / "m")
    content = bytearray(a1.read_bytes())
    content[10] ^= 1
    a1.write_bytes(content)
    with pytest.raises(ValueError, match=r"a-00001-of-00002.bin must hold .* it is damaged"):
        merge_shards([a0, a1], tmp_path / "m")
    assert not list(tmp_path.glob("m.*"))
    u4 = layouts.megatron(tmp_path / "u4", [[[1]]], 4, "<i4")
    u2 = layouts.megatron(tmp_path / "u2", [[[1]]])
    with pytest.raises(ValueError, match="one dtype to be merged, got int32, uint16; convert"):
        merge_shards([u4, u2], tmp_path / "m")
    ds = layouts.datatrove(tmp_path / "d.ds", [[1]])
    with pytest.raises(ValueError, match="format must be given to merge files of datatrove, megat"):
        merge_shards([u2, ds], tmp_path / "m")
    assert len(merge_shards([u2, ds], tmp_path / "n", format="datatrove")) == 2


def test_files_without_an_index_are_converted_with_a_token_or_as_one(tmp_path, capsys):
    raw = layouts.llmc(tmp_path / "a.bin", [9, 1, 2, 9, 3])
    command = ["shards", "convert", str(raw), str(tmp_path / "b"), "--format", "megatron"]
    assert main(command) == 2
    assert "(llm.c) does not store the ends of documents" in capsys.readouterr().err
    assert main([*command, "--bos-token-id", "9"]) == 0
    assert [each.tolist() for each in TokenShards(tmp_path / "b")] == [[9, 1, 2], [9, 3]]
    command[3] = str(tmp_path / "c")
    assert main([*command, "--one-document", "--dtype", "uint8"]) == 0
    assert TokenShards(tmp_path / "c").dtype == np.uint8
    assert len(TokenShards(tmp_path / "c")) == 1


def test_token_ids(tmp_path, capsys):
    path = tmp_path / "ids.jsonl"
    path.write_text(
        "".join(json.dumps({"input_ids": ids}) + "\n" for ids in ([1, 2], [], [70_000]))
    )
    command = ["shards", "write", str(path), str(tmp_path / "a")]
    assert main(command) == 2
    assert "dtype must be given for token ids" in capsys.readouterr().err
    assert main([*command, "--dtype", "uint16"]) == 2
    assert "from 0 to 65535 for uint16, got 70000" in capsys.readouterr().err
    assert main([*command[:3], str(tmp_path / "b"), "--dtype", "int32"]) == 0
    assert [each.tolist() for each in TokenShards(tmp_path / "b")] == [[1, 2], [70_000]]
    assert "2 documents, 1 rows without tokens" in capsys.readouterr().out


def test_chats(tmp_path, tokenizer, capsys):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"prompt": "the cat", "response": "sat on a mat"}) + "\n")
    tokenizer.save_pretrained(tmp_path / "t")
    command = ["shards", "write", str(path), str(tmp_path / "a"), "--chat", "--template", "chatml"]
    assert main([*command, "--tokenizer", str(tmp_path / "t")]) == 2
    assert "format must be 'datatrove' with chat" in capsys.readouterr().err
    assert main([*command, "--tokenizer", str(tmp_path / "t"), "--format", "datatrove"]) == 0
    shards = TokenShards(tmp_path / "a.ds")
    learned = shards.tokens(0, shards.num_tokens)[shards.targets(0, shards.num_tokens)]
    assert tokenizer.decode(learned) == "sat on a mat<|im_end|>"


def test_a_run_that_stops_goes_on(data, tokenizer, tmp_path, monkeypatch):
    write_shards(data, tmp_path / "whole", tokenizer)
    monkeypatch.setattr(write, "_CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(write, "_ROWS", 20)
    encoded = []

    class Stops(TextEncoder):
        def __call__(self, texts, first):
            encoded.append(first)
            if len(encoded) % 5 == 0:
                raise OSError(28, "No space left on device")
            return super().__call__(texts, first)

    monkeypatch.setattr(write, "TextEncoder", Stops)
    reports = []
    for _ in range(20):
        try:
            reports.append(write_shards(data, tmp_path / "stops", tokenizer))
            break
        except OSError:
            assert not (tmp_path / "stops.bin").exists()
    assert len(encoded) > 18
    assert 0 < reports[0].new_tokens < reports[0].tokens
    suffixes = (".bin", ".idx", ".tokenpack.json")
    assert files(tmp_path / "stops", *suffixes) == files(tmp_path / "whole", *suffixes)


def test_a_long_text_is_tokenized_in_pieces_to_the_same_tokens(tokenizer, monkeypatch):
    text = " ".join(TEXTS)
    encoder = TextEncoder(tokenizer, False, False)
    whole = encoder([text, "short"], 0)
    monkeypatch.setattr(encode, "_PIECE", 500)
    monkeypatch.setattr(encode, "_CONTEXT", 60)
    assert len(encoder._pieces(text)) > 20
    assert "".join(encoder._pieces(text)) == text
    pieces = encoder([text, "short"], 0)
    assert pieces.tokens.tolist() == whole.tokens.tolist()
    assert pieces.lengths.tolist() == whole.lengths.tolist()


def test_a_text_is_not_cut_where_that_would_change_its_tokens(tokenizer, monkeypatch):
    """A tokenizer that puts a space before every text."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["pre_tokenizer"]["add_prefix_space"] = True
    other = type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(backend)))
    monkeypatch.setattr(encode, "_PIECE", 500)
    text = "a\nb" * 1000
    assert TextEncoder(other, False, False)._pieces(text) == [text]


DATATROVE_CHAT = {"chat": True, "format": "datatrove"}


def test_arguments(data, tokenizer, tmp_path):
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    for error, message, options in (
        (ValueError, "tokenizer must have the EOS token to add it", {"tokenizer": bare}),
        (ValueError, "rank must be from 0 to world_size - 1 = 1", {"rank": 2, "world_size": 2}),
        (ValueError, "num_proc must be from 1", {"num_proc": 0}),
        (ValueError, "template must not be given without chat", {"template": "chatml"}),
        (ValueError, "bos must not be given with chat", {"chat": True, "bos": True}),
        (ValueError, "tokenizer must be given with chat", {"chat": True, "tokenizer": None}),
        (ValueError, "format must be 'datatrove' with chat, .* got 'megatron'", {"chat": True}),
        (ValueError, "num_proc must be 1 with .*, got 2", {**DATATROVE_CHAT, "num_proc": 2}),
        (ValueError, "bos must not be given for token ids", {"tokenizer": None, "bos": True}),
        (TypeError, "row 0 must be text, got 1", {"column": "id"}),
        (ValueError, "no column", {"column": "nothing"}),
    ):
        with pytest.raises(error, match=message):
            write_shards(data, tmp_path / "a", **{"tokenizer": tokenizer, **options})
