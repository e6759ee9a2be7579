"""A tokenizer named by the user: the ids it gives, and what is refused."""

import pytest

from tokenpack.commands import tokenizer as module
from tokenpack.commands.tokenizer import load_tokenizer
from tokenpack.samples.tokenizer import train_tokenizer


def test_a_tokenizer_file_that_truncates_does_not(tmp_path):
    tokenizer = train_tokenizer(["a b c d"], 400)
    texts = ["a b c d e f", "a"]
    ids = [tokenizer.encode(text).ids for text in texts]
    assert len(ids[0]) > 2
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(str(path))(texts) == ids


def test_what_is_no_tokenizer_is_refused(tmp_path, monkeypatch):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty").mkdir()

    def no_network(*arguments):
        raise OSError("no network")

    monkeypatch.setattr(module.socket, "getaddrinfo", no_network)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name, message in [
        (str(tmp_path / "broken.json"), "broken.json is not a tokenizer.json"),
        (str(tmp_path / "empty"), "no tokenizer in the folder .*empty"),
        (str(tmp_path / "nothing.json"), "no file or folder .*nothing.json"),
        ("./some/where", "no file or folder ./some/where"),
        ("someone/some-model", "no file or folder here .* huggingface.co cannot be reached"),
    ]:
        with pytest.raises(ValueError, match=f"--tokenizer: .*{message}"):
            load_tokenizer(name)
