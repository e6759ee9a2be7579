"""`tokenpack preview`: styles, exit codes, files."""

import json

import pytest

from tokenpack.cli import main

from ..data.chat.helpers import assistant, make_tokenizer, user

ROWS = [
    {"messages": [user("a\r\nb"), assistant("Là"), user("c"), assistant("d")]},
    {"prompt": "e", "response": "f"},
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, ROWS)) + "\n")
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """A tokenizer whose EOS ends an answer."""
    tokenizer = make_tokenizer("chatml")
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def run(data, tokenizer, *others):
    return main(["preview", "--data", data, "--tokenizer", tokenizer, *others])


def test_marks_and_the_report(data, folder, capsys):
    assert run(data, folder) == 0
    printed = capsys.readouterr().out
    assert "⟦Là<|im_end|>⟧" in printed
    assert "── row 2" in printed  # the line between is empty
    assert "the first 2 rows: 2 rows -> 2 samples, 0 dropped" in printed
    assert "\x1b" not in printed


def test_color_and_plain(data, folder, capsysbinary):
    assert run(data, folder, "--style", "color", "--n", "1") == 0
    assert "\x1b[1;32mLà<|im_end|>\x1b[0m".encode() in capsysbinary.readouterr().out
    assert run(data, folder, "--style", "plain") == 0
    tokenizer = make_tokenizer("chatml")
    chats = [ROWS[0]["messages"], [user("e"), assistant("f")]]
    text = "".join(tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats)
    assert capsysbinary.readouterr().out == text.encode()


def test_html_template_and_truncation(data, folder, tmp_path, capsys):
    page = tmp_path / "preview.html"
    options = ["--template", "raw", "--max-length", "30", "--keep", "last", "--loss-on", "last"]
    assert run(data, folder, "--html", str(page), *options) == 0
    printed = capsys.readouterr().out
    assert "User: c\nAssistant:⟦ d<|im_end|>⟧\n" in printed
    assert "User: c\nAssistant:" in page.read_text(encoding="utf-8")


def test_a_problem_is_exit_code_1(data, folder, tmp_path, capsys):
    config = tmp_path / "tokenizer/generation_config.json"
    config.write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert run(data, folder) == 1
    assert "unstopped_terminator: 2 times in 2 rows, first in row 0" in capsys.readouterr().out
    jinja = tmp_path / "t.jinja"
    jinja.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}")
    assert run(data, folder, "--template", str(jinja)) == 0


def test_a_tokenizer_file(data, folder, tmp_path, capsys):
    assert run(data, f"{folder}/tokenizer.json") == 0
    make_tokenizer().backend_tokenizer.save(str(tmp_path / "alone.json"))
    assert run(data, str(tmp_path / "alone.json"), "--template", "gemma") == 0
    assert run(data, str(tmp_path / "alone.json")) == 2
    assert "template must be given if the tokenizer has no chat template" in capsys.readouterr().err


def test_bad_input(data, folder, tmp_path, capsys):
    assert run(str(tmp_path / "missing.jsonl"), folder) == 2
    assert run(data, folder, "--template", "chatlm") == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.startswith("tokenpack: error: ") for line in errors] == [True, True]
