"""Texts from the standard library and from files, and the errors of invalid files."""

import json

import pytest

from tokenpack.samples.text import Text, read_texts, split_summary, standard_library_texts


def write(tmp_path, name, content):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_bytes(content.encode())
    return path


# ---------------------------------------------------------------------------- the standard library


def test_docstrings_are_real_distinct_and_always_the_same():
    texts = standard_library_texts(limit=300)
    assert texts == standard_library_texts(limit=300)
    assert len(texts) == len(set(texts)) == 300
    assert all("\n" in text.source and text.target is None for text in texts)
    # The library's first file with a docstring of several lines.
    assert texts[0].source.startswith("Record of phased-in incompatible language changes.")


def test_a_python_without_sources_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    write(tmp_path, "template.py", "def $name(): pass")
    with pytest.raises(ValueError, match=r"no sources of its standard library.*--data"):
        standard_library_texts()


def test_tests_of_the_library_are_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    (tmp_path / "test").mkdir()
    write(tmp_path, "test/a.py", '"""not\nthis"""')
    write(tmp_path, "b.py", '"""but\nthis"""\nclass C:\n  "one line"')
    assert standard_library_texts() == [Text("but\nthis")]


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "content, sources",
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\ntwo\n\n", ["one", "two"]),
        ("one\nmore\n\n\ntwo\n", ["one\nmore", "two"]),
        ("\ufeffone\r\nmore\r\n\r\ntwo", ["one\nmore", "two"]),
        ("\n\none\n  \ntwo\n", ["one", "two"]),
        ("a\u2028b\nc", ["a\u2028b", "c"]),
    ],
)
def test_txt(tmp_path, content, sources):
    path = write(tmp_path, "a.txt", content)
    assert read_texts(path) == [Text(source) for source in sources]


def test_jsonl(tmp_path):
    lines = [{"text": "one\n\nmore", "id": 3}, {"text": "line\u2028separator"}]
    path = write(
        tmp_path, "a.jsonl", "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    )
    assert read_texts(path) == [Text("one\n\nmore"), Text("line\u2028separator")]


def test_jsonl_with_targets(tmp_path):
    path = write(tmp_path, "a.JSONL", '{"source": "Hallo", "target": "hello"}\r\n')
    assert read_texts(str(path)) == [Text("Hallo", "hello")]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "x", r"must end in \.txt or \.jsonl, got .*a\.csv"),
        ("a.txt", "", r"at least one text, got .*a\.txt"),
        ("a.txt", " \n\n", r"at least one text, got .*a\.txt"),
        ("a.txt", b"fine\nfine\ncaf\xe9\n", r"must be UTF-8, got byte 0xe9 in .*a\.txt, line 3"),
        ("a.jsonl", '{"text": "x"}\n\n{"text": ', r"must be JSON lines, got .*a\.jsonl, line 3"),
        ("a.jsonl", '{"text": "x"}\n["x"]', r"a JSON object per line, got a list in .*line 2"),
        ("a.jsonl", '{"src": "x"}', r"the keys 'text', or .* got \['src'\] in .*line 1"),
        ("a.jsonl", '{"source": "x"}', r"the keys 'text', or 'source' and 'target', .*line 1"),
        ("a.jsonl", '{"text": 3}', r"'text' must be a non-empty string, got int in .*line 1"),
        ("a.jsonl", '{"text": " "}', r"'text' must be .* got an empty string in .*line 1"),
        ("a.jsonl", '{"source": "x", "target": ""}', r"'target' must be .* got an empty string"),
        (
            "a.jsonl",
            '{"text": "\\ud83d"}',
            r"got half of a surrogate pair, .* in .*a\.jsonl, line 1",
        ),
        ("a.jsonl", '{"text": ' + "[" * 200_000, r"too deep a nesting in .*a\.jsonl, line 1"),
        ("a.jsonl", '{"n": ' + "9" * 5000 + "}", r"too many digits in .*a\.jsonl, line 1"),
        (
            "a.jsonl",
            '{"text": "x"}\n{"source": "x", "target": "y"}',
            r"in all lines, got both in .*line 2",
        ),
    ],
)
def test_error_messages_of_invalid_files(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_texts(write(tmp_path, name, content))


def test_error_messages_of_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"a readable file, got .*nothing\.txt: No such file"):
        read_texts(tmp_path / "nothing.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match=r"a readable file, got .*folder\.txt: "):
        read_texts(tmp_path / "folder.txt")


# ------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize(
    "text, pair",
    [
        ("Summary\nstill.\n\nBody.\n\nMore.", ("Body.\n\nMore.", "Summary\nstill.")),
        ("Summary.\nBody.", ("Body.", "Summary.")),
        ("Summary. Body. More.", ("Body. More.", "Summary.")),
        ("One sentence.", None),
        ("Version 3.11 only", None),
    ],
)
def test_split_summary(text, pair):
    assert split_summary(text) == pair
