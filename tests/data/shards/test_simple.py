"""The functions with the seed's names give loaders of all tokens, each a target once."""

import datasets
import numpy as np
import pytest

from tokenpack.data import (
    DataConfig,
    TokenShards,
    from_binary,
    from_files,
    from_hf,
    from_npy_split,
    save_binary,
    train_tokenizer,
)

TEXTS = [f"ROMEO: line {at}, but soft, what light!\n" * (at % 5 + 1) for at in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def targets(loader):
    """The targets of an epoch, as a model that shifts the labels reads them."""
    labels = np.concatenate([batch.labels[:, 1:].flatten().numpy() for batch in loader])
    return labels[labels != -100]


def test_binary_files_of_both_kinds(tmp_path, tokenizer, capsys):
    ids = tokenizer("".join(TEXTS)).input_ids
    for name in ("data.bin", "data.npy"):
        save_binary(ids, tmp_path / name)
        cfg = DataConfig(seq_len=16, batch_size=4, debug=True, debug_n=1)
        paths = {"train_path": tmp_path / "train.npy", "val_path": tmp_path / "val.npy"}
        train, validation = from_binary(tmp_path / name, cfg, tokenizer=tokenizer, **paths)
        assert "⟦" in capsys.readouterr().out
        cut = round(0.9 * len(ids))
        assert sorted(targets(train)) == sorted(ids[1:cut])
        assert targets(validation).tolist() == ids[cut + 1 :]
        assert next(iter(train)).input_ids.shape == (4, 17)
        again = from_npy_split(tmp_path / "train.npy", tmp_path / "val.npy", DataConfig(seq_len=16))
        assert sorted(targets(again[0])) == sorted(ids[1:cut])
        assert targets(again[1]).tolist() == ids[cut + 1 :]
    assert (tmp_path / "data.bin").read_bytes() == np.array(ids, "<u2").tobytes()
    assert np.load(tmp_path / "data.npy").tolist() == ids


def test_text_files_are_documents(tmp_path, tokenizer):
    paths = []
    for at, text in enumerate(TEXTS[:6]):
        paths.append(tmp_path / f"{at}.txt")
        paths[-1].write_text(text)
    cfg = DataConfig(seq_len=8, split=0.5)
    marks = {"bos_id": tokenizer.bos_token_id, "eos_id": tokenizer.eos_token_id}
    train, validation = from_files(paths, tokenizer, cfg, **marks)
    expected = [
        token for text in TEXTS[:6] for token in [*tokenizer(text).input_ids, marks["eos_id"]]
    ]
    found = np.concatenate([targets(train), targets(validation)])
    assert sorted(found) == sorted(expected)  # all but the BOS of each document
    lengths = [batch.cu_seqlens.diff().max() for batch in train]
    assert max(lengths) <= 9


@pytest.mark.parametrize("texts", [["".join(TEXTS)], ["".join(TEXTS[:16]), "".join(TEXTS[16:])]])
def test_one_or_two_files_are_split_as_the_options_say(tmp_path, tokenizer, texts):
    paths = [tmp_path / f"{at}.txt" for at in range(len(texts))]
    for path, text in zip(paths, texts):
        path.write_text(text)
    train, validation = from_files(paths, tokenizer, DataConfig(seq_len=8, split=0.9))
    total = sum(len(tokenizer(text).input_ids) for text in texts)
    assert train.samples.bounds == (0, round(0.9 * total))
    assert validation.samples.bounds == (round(0.9 * total), total)


def test_a_dataset(tmp_path, tokenizer):
    rows = datasets.Dataset.from_dict({"body": TEXTS, "id": range(40)})
    train, validation = from_hf(
        rows, tokenizer, DataConfig(seq_len=32), text_col="body", val_path=tmp_path / "val.bin"
    )
    expected = [tokenizer(text).input_ids for text in TEXTS]
    found = np.concatenate([targets(train), targets(validation)])
    assert sorted(found) == sorted(token for document in expected for token in document[1:])
    saved = TokenShards(tmp_path / "val.bin", dtype="uint16")[0].tolist()
    flat = [token for document in expected for token in document]
    assert saved == flat[-len(saved) :]
    with pytest.raises(ValueError, match="text_col must be one of body, id, got 'text'"):
        from_hf(rows, tokenizer, DataConfig())
    with pytest.raises(TypeError, match="for a stream, use pack_stream"):
        from_hf(rows.to_iterable_dataset(), tokenizer, DataConfig())


def test_what_does_not_fit_is_an_error(tmp_path, tokenizer):
    with pytest.raises(
        ValueError, match=r"ids must be from 0 to 65535 .*, got 70000; pass another"
    ):
        save_binary([1, 70_000], tmp_path / "a.bin")
    assert not list(tmp_path.iterdir())
    save_binary(range(1000), tmp_path / "a.bin", "uint32")
    cfg = DataConfig(seq_len=8)
    with pytest.raises(ValueError, match="every second 16-bit id is 0, as in a file of 32-bit ids"):
        from_binary(tmp_path / "a.bin", cfg)
    train, _ = from_binary(tmp_path / "a.bin", cfg, dtype="uint32")
    assert sorted(targets(train)) == list(range(1, 900))
    with pytest.raises(ValueError, match="split must be between 0 and 1, got 1"):
        DataConfig(split=1)
    with pytest.raises(ValueError, match="seq_len must be from 1"):
        DataConfig(seq_len=0)
    with pytest.raises(ValueError, match=r"tokenizer must be given with cfg.debug"):
        from_binary(tmp_path / "a.bin", DataConfig(debug=True), dtype="uint32")
