"""Lengths are the same from a column, from Arrow and from items, which are made once at most."""

import gc
import logging

import numpy as np
import pytest
import torch

datasets = pytest.importorskip("datasets")

from tokenpack.trainer import example_lengths as module  # noqa: E402
from tokenpack.trainer.example_lengths import dataset_lengths  # noqa: E402

SOURCES = [[5, 6, 7], [8], [9, 1], [2, 3, 4, 5], [6]]
LABELS = [[1, 2], [3, 4, 5], [6], [7], [8, 9]]
BOTH = [[3, 2], [1, 3], [2, 1], [4, 1], [1, 2]]


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    monkeypatch.setattr(module, "_shows_progress", lambda: False)


def rows(**columns):
    columns = {"input_ids": SOURCES, "labels": LABELS, **columns}
    return {name: column for name, column in columns.items() if column is not None}


def arrow(**columns):
    return datasets.Dataset.from_dict(rows(**columns))


class Items(torch.utils.data.Dataset):
    """A map-style dataset that counts how many items it has made."""

    def __init__(self, columns, make=lambda tokens: tokens):
        self.columns, self.make, self.made = columns, make, 0

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, at):
        self.made += 1
        return {name: self.make(column[at]) for name, column in self.columns.items()}


class InBlocks(Items):
    blocks = 0

    def __getitems__(self, many):
        self.blocks += 1
        return [self[at] for at in many]


KINDS = {
    "arrow": arrow,
    "items": lambda **columns: Items(rows(**columns)),
    "blocks": lambda **columns: InBlocks(rows(**columns)),
    "list": lambda **columns: [
        dict(zip(rows(**columns), row)) for row in zip(*rows(**columns).values())
    ],
    "transform": lambda **columns: arrow(**columns).with_transform(dict),
}


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


def test_sources_and_labels(make):
    found = dataset_lengths(make())
    assert found.tolist() == BOTH
    assert found.dtype == np.int64
    assert dataset_lengths(make(), kind="causal").tolist() == [3, 1, 2, 4, 1]
    assert dataset_lengths(make(labels=None)).tolist() == [[source, 0] for source, _ in BOTH]


def test_a_length_column_takes_precedence(make):
    given = [30, 10, 20, 40, 50]
    assert dataset_lengths(make(input_length=given))[:, 0].tolist() == given
    assert dataset_lengths(make(input_length=given))[:, 1].tolist() == [2, 3, 1, 1, 2]
    alone = make(input_length=given, input_ids=None, labels=None)
    assert dataset_lengths(alone).tolist() == [[each, 0] for each in given]
    assert dataset_lengths(alone, kind="causal").tolist() == given
    other = make(size=given, input_ids=None, labels=None, labels_length=[1, 2, 3, 4, 5])
    assert dataset_lengths(other, "size")[:, 1].tolist() == [1, 2, 3, 4, 5]
    other = make(size=given, input_ids=None, labels=None, label_length=[1, 2, 3, 4, 5])
    assert dataset_lengths(other, "size")[:, 1].tolist() == [1, 2, 3, 4, 5]


def test_padding_is_not_counted(make):
    masks = [[1, 1, 0], [1], [0, 1], [0, 0, 0, 0], [1]]
    labels = [[1, -100], [-100, 4, 5], [-100], [7], [-100, 9]]
    found = dataset_lengths(make(attention_mask=masks, labels=labels))
    assert found.tolist() == [[2, 1], [1, 3], [1, 0], [0, 1], [1, 2]]


def test_columns_with_other_names(make):
    dataset = make(text=SOURCES, summary=LABELS, input_ids=None, labels=None)
    found = dataset_lengths(dataset, source_column="text", target_column="summary")
    assert found.tolist() == BOTH


def test_items_are_read_in_blocks_if_possible(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 2)
    dataset = InBlocks(rows())
    assert dataset_lengths(dataset).tolist() == BOTH
    assert dataset.blocks == 3


@pytest.mark.parametrize(
    "hold", [list, tuple, np.array, torch.tensor, lambda tokens: torch.tensor(tokens).int()]
)
def test_all_containers_of_tokens(hold):
    columns = rows(attention_mask=[[1] * len(each) for each in SOURCES])
    assert dataset_lengths(Items(columns, hold)).tolist() == BOTH
    sizes = {"input_length": [3, 1, 2]}
    assert dataset_lengths(Items(sizes, lambda n: hold([n])[0])).tolist() == [
        [3, 0],
        [1, 0],
        [2, 0],
    ]


# ------------------------------------------------------------------------------------------ columns


SELECTED = {
    "shuffled": lambda dataset: dataset.shuffle(seed=3),
    "a range": lambda dataset: dataset.select(range(1, 4)),
    "some, twice": lambda dataset: dataset.select([4, 0, 0, 2]),
    "of some": lambda dataset: dataset.select([4, 0, 3, 2]).select([3, 1]),
    "split": lambda dataset: dataset.train_test_split(0.4, seed=0)["train"],
    "joined": lambda dataset: datasets.concatenate_datasets([dataset, dataset.shuffle(seed=1)]),
    "formatted": lambda dataset: dataset.with_format("torch"),
    "narrower": lambda dataset: dataset.cast_column(
        "labels", datasets.List(datasets.Value("int16"))
    ),
    "large": lambda dataset: dataset.cast_column(
        "input_ids", datasets.LargeList(datasets.Value("int32"))
    ),
    "none": lambda dataset: dataset.select([]),
    "sharded": lambda dataset: dataset.shard(2, 1, contiguous=False),
}


@pytest.mark.parametrize("name", SELECTED)
@pytest.mark.parametrize("masked", [False, True])
def test_selected_rows_of_a_dataset(name, masked):
    masks = [[1, 0, 1], [1], [0, 1], [1, 1, 0, 0], [1]]
    dataset = SELECTED[name](arrow(attention_mask=masks if masked else None))
    plain = dataset.with_format(None)
    sources = plain["attention_mask"] if masked else [[1] * len(ids) for ids in plain["input_ids"]]
    want = [[sum(mask), len(labels)] for mask, labels in zip(sources, plain["labels"])]
    assert dataset_lengths(dataset).tolist() == want


def test_random_padding_is_counted_as_by_item():
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 2, rng.integers(0, 9)).tolist() for _ in range(300)]
    labels = [rng.choice([-100, 5], rng.integers(0, 7)).tolist() for _ in range(300)]
    columns = {"input_ids": masks, "attention_mask": masks, "labels": labels}
    dataset = datasets.concatenate_datasets(
        [datasets.Dataset.from_dict({n: c[a:a + 60] for n, c in columns.items()})
         for a in range(0, 300, 60)])  # fmt: skip
    assert (dataset_lengths(dataset) == dataset_lengths(Items(columns))).all()


def test_arrow_is_read_by_column(monkeypatch):
    dataset = arrow()
    monkeypatch.setattr(type(dataset), "__getitem__", lambda *_: pytest.fail("made an item"))
    monkeypatch.setattr(module, "_by_item", lambda *_: pytest.fail("measured by item"))
    assert dataset_lengths(dataset).tolist() == BOTH


def test_a_transform_makes_the_items():
    dataset = datasets.Dataset.from_dict({"text": ["a b", "c", "d e f"]})
    split = dataset.with_transform(
        lambda batch: {"input_ids": [[1] * len(text.split()) for text in batch["text"]]}
    )
    assert dataset_lengths(split).tolist() == [[2, 0], [1, 0], [3, 0]]


# ----------------------------------------------------------------------------------------- collator


class Halves:
    def lengths(self, raw_lengths):
        assert raw_lengths.shape == (5, 2)
        raw_lengths = raw_lengths[:, 0]
        return np.stack([raw_lengths - raw_lengths // 2, raw_lengths // 2], axis=1)


def test_a_collator_can_change_lengths(make):
    dataset = make(labels=None)
    assert dataset_lengths(dataset, collator=Halves()).tolist() == [
        [2, 1], [1, 0], [1, 1], [2, 2], [1, 0]
    ]  # fmt: skip
    assert dataset_lengths(dataset, collator=list).tolist() == [[s, 0] for s, _ in BOTH]

    class Wrong:
        def lengths(self, raw_lengths):
            return raw_lengths[:, 0]

    with pytest.raises(ValueError, match=r"collator.lengths must return \(5, 2\) .* \(5,\)"):
        dataset_lengths(dataset, collator=Wrong())


# ------------------------------------------------------------------------------------------- cache


def test_items_are_made_once_per_dataset():
    dataset = Items(rows())
    dataset_lengths(dataset)
    changed = dataset_lengths(dataset)
    assert dataset.made == 5
    changed[:] = 0  # a copy
    assert dataset_lengths(dataset).tolist() == BOTH
    assert dataset.made == 5
    dataset_lengths(dataset, target_column="other")
    assert dataset.made == 10
    dataset_lengths(dataset, cache=False)
    assert dataset.made == 15
    number = id(dataset)
    unkept = Items(rows())
    dataset_lengths(unkept, cache=False)
    assert id(unkept) not in module._cached
    assert number in module._cached
    del dataset
    gc.collect()
    assert number not in module._cached


def test_datasets_that_compare_equal_are_cached_separately():
    class Equal(Items):
        __hash__ = None

        def __eq__(self, other):
            return True

    assert dataset_lengths(Equal(rows())).tolist() == BOTH
    first, second = Equal(rows()), Equal(rows(input_ids=LABELS))
    assert dataset_lengths(first).tolist() == BOTH
    assert dataset_lengths(second)[:, 0].tolist() == [2, 3, 1, 1, 2]


def test_a_dataset_that_has_grown_is_measured_again():
    dataset = Items({"input_ids": [[1, 2]]})
    assert len(dataset_lengths(dataset)) == 1
    dataset.columns["input_ids"].append([1, 2, 3])
    assert dataset_lengths(dataset).tolist() == [[2, 0], [3, 0]]


def test_a_format_set_in_place_invalidates_the_cache():
    dataset = datasets.Dataset.from_dict({"text": ["a b", "c"]})
    for words in (1, 2):
        dataset.set_transform(
            lambda batch, n=words: {"input_ids": [[1] * n for _ in batch["text"]]}
        )
        assert dataset_lengths(dataset)[:, 0].tolist() == [words] * 2


@pytest.fixture
def on_disk(tmp_path):
    masks = [[1] * len(each) for each in SOURCES]
    arrow(attention_mask=masks).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def kept(folder):
    return list(folder.glob("tokenpack-lengths-*"))


def test_lengths_of_a_dataset_on_disk_are_cached_next_to_it(on_disk, monkeypatch):
    assert dataset_lengths(datasets.load_from_disk(on_disk), cache=False).tolist() == BOTH
    assert not kept(on_disk)
    assert dataset_lengths(datasets.load_from_disk(on_disk)).tolist() == BOTH
    (file,) = kept(on_disk)
    selected = datasets.load_from_disk(on_disk).select([3, 1])
    assert dataset_lengths(selected).tolist() == [BOTH[3], BOTH[1]]  # has another fingerprint
    assert len(kept(on_disk)) == 2
    with monkeypatch.context() as patched:
        patched.setattr(module, "_by_column", lambda *_: pytest.fail("measured again"))
        assert dataset_lengths(datasets.load_from_disk(on_disk)).tolist() == BOTH
    for broken in (b"", b"\x93NUMPY", b"no array"):
        file.write_bytes(broken)
        assert dataset_lengths(datasets.load_from_disk(on_disk)).tolist() == BOTH
    np.save(file, np.zeros((3, 2), np.int64))
    assert dataset_lengths(datasets.load_from_disk(on_disk)).tolist() == BOTH


def test_a_read_only_folder_is_not_an_error(on_disk, monkeypatch, caplog):
    def refuse(*args, **options):
        raise PermissionError("read-only")

    monkeypatch.setattr(module.Path, "open", refuse)
    with caplog.at_level(logging.INFO, module.__name__):
        assert dataset_lengths(datasets.load_from_disk(on_disk)).tolist() == BOTH
    assert "read-only" in caplog.text
    assert not kept(on_disk)


def test_a_failed_write_leaves_no_file(on_disk, monkeypatch):
    def refuse(*args, **options):
        raise OSError("disk full")

    monkeypatch.setattr(module.np, "save", refuse)
    assert dataset_lengths(datasets.load_from_disk(on_disk)).tolist() == BOTH
    assert not kept(on_disk)


def test_progress_follows_the_argument_or_the_verbosity_of_transformers(capfd, monkeypatch):
    dataset_lengths(Items(rows()), show_progress=True)
    assert "Measuring examples" in capfd.readouterr().err
    dataset_lengths(Items(rows()), show_progress=False)
    assert not capfd.readouterr().err
    monkeypatch.undo()  # the patch of the fixture
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    try:
        for level, shown in ((transformers_logging.ERROR, False), (before, True)):
            transformers_logging.set_verbosity(level)
            assert module._shows_progress() == shown
    finally:
        transformers_logging.set_verbosity(before)


# ------------------------------------------------------------------------------------------- errors


def test_datasets_without_lengths():
    with pytest.raises(TypeError, match=r"dataset must have a length, .* got IterableDataset"):
        dataset_lengths(arrow().to_iterable_dataset())
    with pytest.raises(TypeError, match=r"dataset\[0\] must be a mapping, got list"):
        dataset_lengths([[1, 2, 3]])
    with pytest.raises(ValueError, match="kind must be one of seq2seq, causal, got 'both'"):
        dataset_lengths(arrow(), kind="both")


def test_neither_length_column_nor_tokens(make):
    with pytest.raises(ValueError, match=r"'size' of lengths .*'input_ids' .* got text, summary"):
        dataset_lengths(make(input_ids=None, labels=None, text=SOURCES, summary=LABELS), "size")


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"input_ids": ["a b"] * 5}, "input_ids.* must be"),
        ({"input_ids": [[0.5]] * 5}, "input_ids.* must be .*integers"),
        ({"input_ids": [[[1, 2]]] * 5}, "input_ids.* must be"),
        ({"input_length": [1.5] * 5}, "input_length.* must be .*integer"),
    ],
)
def test_columns_without_tokens(make, columns, message):
    with pytest.raises((TypeError, ValueError), match=message):
        dataset_lengths(make(**columns))


def test_rows_without_a_list():
    with pytest.raises(TypeError, match=r"labels\[1\] must be a list of integers, got null"):
        dataset_lengths(arrow(labels=[[1], None, [2], [3], [4]]))
    selected = arrow(labels=[[1], None, [2], [3], None]).select([0, 2, 4])
    with pytest.raises(TypeError, match=r"labels\[2\] must be a list of integers, got null"):
        dataset_lengths(selected)
    assert dataset_lengths(selected.select([1, 0])).tolist() == [[2, 1], [3, 1]]
    with pytest.raises(TypeError, match=r"input_length must be integers, got .* 1 nulls"):
        dataset_lengths(arrow(input_length=[1, None, 3, 4, 5]))
