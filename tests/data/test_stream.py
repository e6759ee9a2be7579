"""Streams of packed rows give each sample once over ranks and workers, and can resume anywhere."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tokenpack.data import PackedStreamLoader, collate_packed_rows, pack_dataset, pack_stream

from ..long import long_unless

datasets = pytest.importorskip("datasets")
CAPACITY = 32


def make_samples(count=150, seed=0):
    """Each token identifies its sample and its position, so that rows can be checked."""
    lengths = np.random.default_rng(seed).integers(1, CAPACITY + 1, count)
    return [[1000 * (i + 1) + k for k in range(length)] for i, length in enumerate(lengths)]


SAMPLES = make_samples()


class Plain:
    """An iterable that is neither a sequence nor a dataset."""

    def __iter__(self):
        return iter(SAMPLES)


def generate(shards):
    for shard in shards:
        for sample in SAMPLES[shard::4]:
            yield {"input_ids": sample}


SOURCES = {
    "list": lambda: SAMPLES,
    "mappings": lambda: [{"input_ids": s, "labels": s} for s in SAMPLES],
    "iterable": Plain,
    "dataset": lambda: datasets.Dataset.from_dict({"input_ids": SAMPLES}),
    "iterable dataset": lambda: datasets.IterableDataset.from_generator(
        generate, gen_kwargs={"shards": [0, 1, 2, 3]}
    ),
}


def sequences_of(rows):
    """Split rows into their samples at the boundaries."""
    found = []
    for row in rows:
        ids, start = list(map(int, row["input_ids"])), 0
        for length in map(int, row["seq_lengths"]):
            found.append(ids[start : start + length])
            start += length
        assert not any(ids[start:])
    return found


def as_lists(batches):
    return [
        {name: value.tolist() for name, value in batch.items() if torch.is_tensor(value)}
        for batch in batches
    ]


@pytest.mark.parametrize("source", SOURCES)
def test_rows_hold_each_sample_once_with_labels_and_positions(source):
    rows = list(pack_stream(SOURCES[source](), CAPACITY, lookahead=40))
    assert sorted(sequences_of(rows)) == sorted(SAMPLES)
    for row in rows:
        want_labels, want_positions = [], []
        ids = row["input_ids"].tolist()
        for length in row["seq_lengths"].tolist():
            want_labels += [-100, *ids[len(want_labels) + 1 : len(want_labels) + length]]
            want_positions += range(length)
        padding = CAPACITY - len(want_labels)
        assert row["labels"].tolist() == want_labels + [-100] * padding
        assert row["position_ids"].tolist() == want_positions + list(range(padding))


# Each source without workers and with some, and each number of workers with two sources or more.
SHARED = [(1, 2), (2, 0), (2, 3), (3, 1)]
SOME_SHARED = [
    *((name, 2, 0) for name in SOURCES),
    *((name, *SHARED[at]) for name, at in zip(SOURCES, (0, 2, 3, 0, 2))),
]


@pytest.mark.parametrize(
    "source, world_size, num_workers",
    long_unless(SOME_SHARED, ((name, *shared) for name in SOURCES for shared in SHARED)),
)
def test_ranks_and_workers_share_the_samples_without_loss_or_repetition(
    source, world_size, num_workers
):
    found = []
    for rank in range(world_size):
        stream = pack_stream(
            SOURCES[source](), CAPACITY, lookahead=20, rank=rank, world_size=world_size,
            uneven_rows="allow",
        )  # fmt: skip
        loader = DataLoader(stream, batch_size=None, num_workers=num_workers)
        found += sequences_of(loader)
    assert sorted(found) == sorted(SAMPLES)


SOME_RESUMED = [*((name, 0) for name in SOURCES), *zip(SOURCES, (1, 3, 1, 3, 3))]


@pytest.mark.parametrize(
    "source, num_workers", long_unless(SOME_RESUMED, product(SOURCES, [0, 1, 3]))
)
def test_a_loader_resumes_from_any_batch(source, num_workers):
    def loader():
        stream = pack_stream(SOURCES[source](), CAPACITY, "obfd", lookahead=16)
        return PackedStreamLoader(stream, batch_size=4, num_workers=num_workers)

    states, whole = [], []
    first = loader()
    states.append(json.loads(json.dumps(first.state_dict())))
    for batch in first:
        whole.append(batch)
        states.append(json.loads(json.dumps(first.state_dict())))
    assert len(whole) > 12
    whole = as_lists(whole)
    assert first.state_dict() == states[0]  # the epoch is over; the next one starts anew
    # Workers start slowly, so with workers only some batches are tested.
    stops = range(len(states)) if num_workers == 0 else (1, 5, len(whole) - 1, len(whole))
    for stop in stops:
        again = loader()
        again.load_state_dict(states[stop])
        assert as_lists(again) == whole[stop:], stop
    if num_workers == 0:
        assert as_lists(again) == whole  # the next epoch is complete


def test_a_stream_resumes_without_a_loader():
    whole = [row["input_ids"].tolist() for row in pack_stream(SAMPLES, CAPACITY, lookahead=16)]
    for stop in (1, 7, 30, len(whole)):
        stream, rows = pack_stream(SAMPLES, CAPACITY, lookahead=16), []
        for row in stream:
            rows.append(row["input_ids"].tolist())
            if len(rows) == stop:
                break
        other = pack_stream(SAMPLES, CAPACITY, lookahead=16)
        other.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert rows + [row["input_ids"].tolist() for row in other] == whole


def test_resuming_reads_no_sample_before_the_window():
    class Watched(list):
        read = ()

        def __getitem__(self, index):
            self.read = (*self.read, index)
            return super().__getitem__(index)

    samples = Watched(SAMPLES)
    loader = PackedStreamLoader(pack_stream(samples, CAPACITY, lookahead=16), batch_size=1)
    for _ in zip(range(40), loader):
        pass
    state, samples.read = loader.state_dict(), ()
    loader.load_state_dict(state)
    next(iter(loader))
    assert min(samples.read) == state["positions"][0]["window"] > 40


def shuffled():
    """Shards in a different order in each epoch, and samples through a shuffle buffer."""
    source = datasets.IterableDataset.from_generator(generate, gen_kwargs={"shards": [0, 1, 2, 3]})
    return source.shuffle(seed=3, buffer_size=20)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("source", ["shuffled", "iterable dataset"])
def test_resuming_in_a_later_epoch_of_a_source_that_shuffles(source, num_workers):
    def loader(epoch=None):
        made = shuffled() if source == "shuffled" else SOURCES[source]()
        stream = pack_stream(made, CAPACITY, "obfd", lookahead=16)
        if epoch is not None:
            stream.set_epoch(epoch)
        return PackedStreamLoader(stream, batch_size=4, num_workers=num_workers)

    first, states, whole = loader(epoch=1), [], []
    for batch in first:
        whole.append(batch)
        states.append(json.loads(json.dumps(first.state_dict())))
    found = sequences_of(
        {"input_ids": ids, "seq_lengths": (bounds[:, 1] - bounds[:, 0])}
        for batch in whole
        for ids, bounds in zip(batch.input_ids, batch.boundaries)
    )
    assert sorted(found) == sorted(SAMPLES)
    whole = as_lists(whole)
    if source == "shuffled":
        assert as_lists(loader(epoch=0)) != whole
    for stop in (1, 7, len(whole) - 1):
        again = loader()  # as in a new process, where no epoch is set
        again.load_state_dict(states[stop - 1])
        assert as_lists(again) == whole[stop:], stop


def test_only_iterable_datasets_split_samples_over_workers_themselves():
    class Stateful(Plain):
        def state_dict(self):
            raise AssertionError("state_dict was called")

        load_state_dict = state_dict

    loader = DataLoader(pack_stream(Stateful(), CAPACITY), batch_size=None, num_workers=2)
    assert sorted(sequences_of(loader)) == sorted(SAMPLES)


def test_a_state_of_a_stream_with_other_options_raises():
    state = PackedStreamLoader(pack_stream(SAMPLES, CAPACITY)).state_dict()
    for options, message in (
        ({"lookahead": 16}, "with lookahead=16, got lookahead=8192"),
        ({"rank": 1, "world_size": 2, "uneven_rows": "allow"}, "with rank=1, got rank=0"),
        ({"strategy": "nf"}, "with strategy='nf', got strategy='auto'"),
    ):
        other = PackedStreamLoader(pack_stream(SAMPLES, CAPACITY, **options))
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="state must have 'num_workers'"):
        PackedStreamLoader(pack_stream(SAMPLES, CAPACITY)).load_state_dict({})
    with pytest.raises(ValueError, match="state must have 'part'"):
        pack_stream(SAMPLES, CAPACITY).load_state_dict(state)


def test_masks_and_labels_in_only_some_samples():
    masked = [{"input_ids": [1, 2, 3, 0], "attention_mask": [1, 1, 1, 0]}]
    assert next(iter(pack_stream(masked, 4)))["seq_lengths"].tolist() == [3]
    some = [{"input_ids": [1, 2]}, {"input_ids": [3, 4], "labels": [-100, 4]}]
    for samples in (some, some[::-1]):
        with pytest.raises(ValueError, match="must have 'labels', got only"):
            list(pack_stream(samples, 4))
    rows = [{**some[0], "seq_lengths": [2]}, {**some[1], "seq_lengths": [2]}]
    for wrong in (rows, rows[::-1]):
        with pytest.raises(ValueError, match="'labels'"):
            collate_packed_rows(wrong)
    with pytest.raises(ValueError, match="at most 2 in total, got"):
        collate_packed_rows([{"input_ids": [1, 2], "seq_lengths": [3]}])
    with pytest.raises(ValueError, match="at least one row"):
        collate_packed_rows([])


def test_accelerate_finds_batches_in_the_loader():
    accelerate = pytest.importorskip("accelerate")
    loader = PackedStreamLoader(pack_stream(SAMPLES, CAPACITY, lookahead=16), batch_size=4)
    want = as_lists(loader)
    config = accelerate.DataLoaderConfiguration(dispatch_batches=False)
    accelerator = accelerate.Accelerator(cpu=True, dataloader_config=config)
    assert as_lists(accelerator.prepare(loader)) == want
    # By default, accelerate cuts each tensor to the number of rows.
    with pytest.raises(ValueError, match="set dispatch_batches=False"):
        list(accelerate.Accelerator(cpu=True).prepare(loader))


def test_an_iteration_after_an_unfinished_one_starts_at_the_beginning():
    loader = PackedStreamLoader(pack_stream(SAMPLES, CAPACITY, lookahead=16), batch_size=4)
    whole = as_lists(loader)
    for _ in zip(range(3), loader):
        pass
    assert as_lists(loader) == whole


def test_stream_and_dataset_give_the_same_rows():
    rows = pack_dataset(SAMPLES, CAPACITY, "obfd", padding_value=7, progress=False)
    stream = pack_stream(SAMPLES, CAPACITY, "obfd", padding_value=7, lookahead=1000)
    from_stream = collate_packed_rows(list(stream))
    from_dataset = collate_packed_rows(list(rows))
    assert as_lists([from_stream]) == as_lists([from_dataset])
    assert from_stream.input_ids.tolist() == rows[:]["input_ids"]
    assert from_stream.labels.tolist() == rows[:]["labels"]
    assert from_stream.position_ids.tolist() == rows[:]["position_ids"]
    assert from_stream.attention_mask.tolist() == rows[:]["attention_mask"]


def test_overlong_and_empty_samples():
    stream = pack_stream([[], [1] * 9, [2, 3]], 4, overlong="drop", drop_empty=True, lookahead=2)
    assert [row["input_ids"].tolist() for row in stream] == [[2, 3, 0, 0]]
    with pytest.raises(ValueError, match="at most capacity = 4"):
        list(pack_stream([[1] * 9], 4))
    with pytest.raises(ValueError, match="must be 1 or more"):
        list(pack_stream([[]], 4))
    with pytest.raises(ValueError, match=r"labels of samples\[0\] must be as long"):
        list(pack_stream([{"input_ids": [1, 2], "labels": [1]}], 4))


def test_bad_arguments():
    with pytest.raises(TypeError, match="can be iterated once"):
        pack_stream(iter(SAMPLES), CAPACITY)
    with pytest.raises(ValueError, match="lookahead must be 1 or more"):
        pack_stream(SAMPLES, CAPACITY, lookahead=0)
    with pytest.raises(ValueError, match="rank must be from 0 to world_size - 1 = 1, got 2"):
        pack_stream(SAMPLES, CAPACITY, rank=2, world_size=2)
    loader = PackedStreamLoader(pack_stream(SAMPLES, CAPACITY), num_workers=2)
    state = PackedStreamLoader(pack_stream(SAMPLES, CAPACITY)).state_dict()
    with pytest.raises(ValueError, match="with num_workers=2, got num_workers=0"):
        loader.load_state_dict(state)
    with pytest.raises(ValueError, match=r"rows\[0\] must have 'seq_lengths'"):
        collate_packed_rows([{"input_ids": [1]}])
    with pytest.raises(ValueError, match=r"got \[1, 2\]"):
        collate_packed_rows([{"input_ids": [1] * n, "seq_lengths": [n]} for n in (1, 2)])
