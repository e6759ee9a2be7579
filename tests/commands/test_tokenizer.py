"""The user's tokenizer: the ids that it gives, and bad input."""

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


def test_bad_tokenizers_are_refused(tmp_path, monkeypatch):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty").mkdir()

    def no_network(*arguments):
        raise OSError("no network")

    monkeypatch.setattr(module.socket, "getaddrinfo", no_network)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name, message in [
        (str(tmp_path / "broken.json"), "a valid tokenizer.json, got .*broken.json"),
        (str(tmp_path / "empty"), "the folder of a tokenizer, got .*empty"),
        (str(tmp_path / "nothing.json"), "a file or folder that exists, got .*nothing.json"),
        ("./some/where", "a file or folder that exists, got ./some/where"),
        ("someone/some-model", "no such file or folder, .* huggingface.co cannot be reached"),
    ]:
        with pytest.raises(ValueError, match=f"--tokenizer must be .*{message}"):
            load_tokenizer(name)
