"""Who shares the samples of a stream: workers, ranks and sources that share them themselves."""

import warnings

import datasets
import pytest
import torch
from torch.utils.data import IterableDataset, get_worker_info

from tokenpack.data import PackedStreamLoader, pack_stream
from tokenpack.data.packed.deal import RowDeal, beginning

SAMPLES = [[n] * (1 + n % 5) for n in range(1, 41)]


class Shares(IterableDataset):
    """Shares its samples among the workers, as PyTorch's documentation does."""

    def __iter__(self):
        info = get_worker_info()
        begin, step = (info.id, info.num_workers) if info else (0, 1)
        return iter(SAMPLES[begin::step])


class Wraps:
    """A plain class around a dataset that shares its samples."""

    def __iter__(self):
        rows = datasets.Dataset.from_dict({"input_ids": SAMPLES}).to_iterable_dataset(2)
        for row in rows:
            yield row["input_ids"]


class Seeds(IterableDataset):
    """Reads only the number of its worker, and gives every worker all samples."""

    def __iter__(self):
        info = get_worker_info()
        torch.Generator().manual_seed(info.id if info else 0)
        return iter(SAMPLES)


class AsksLater(IterableDataset):
    def __iter__(self):
        for at, sample in enumerate(SAMPLES):
            if at == 3 and (info := get_worker_info()) is not None:
                assert info.id < info.num_workers
            yield sample


class Misses(IterableDataset):
    """Has a length, and gives fewer samples."""

    def __len__(self):
        return len(SAMPLES)

    def __iter__(self):
        return iter(SAMPLES[:30])


def read(source, num_workers=2, **options):
    stream = pack_stream(source, 8, "nf", lookahead=6, **options)
    loader = PackedStreamLoader(stream, batch_size=2, num_workers=num_workers)
    found = []
    for batch in loader:
        for ids, bounds in zip(batch.input_ids.tolist(), batch.boundaries):
            found += [ids[a:b] for a, b in bounds.tolist()]
    return sorted(found), loader


@pytest.mark.parametrize(
    "source, options",
    [
        (Shares(), {}),
        (Wraps(), {}),
        (Shares(), {"sharded_by": "source"}),
        (Seeds(), {}),
        (Seeds(), {"sharded_by": "stream"}),
        (datasets.Dataset.from_dict({"a": SAMPLES}).to_iterable_dataset(2)["a"], {}),
    ],
    ids=["shares", "wraps", "says it shares", "seeds", "says it does not", "column"],
)
def test_no_sample_is_lost_or_repeated_whoever_shares_them(source, options):
    found, loader = read(source, **options)
    assert found == sorted(SAMPLES)
    assert sum(each.samples for each in loader.counts) == len(SAMPLES)


def test_the_loader_warns_if_samples_are_missing():
    with pytest.warns(UserWarning, match=r"30 samples were read, .* is 40; by worker: \[30\]"):
        read(Misses(), num_workers=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(SAMPLES, num_workers=0)


def test_a_source_that_asks_late_must_say_who_shares():
    with pytest.raises(ValueError, match="sharded_by must be 'source' or 'stream' for a AsksLater"):
        read(AsksLater())
    assert read(AsksLater(), sharded_by="stream")[0] == sorted(SAMPLES)


def test_a_dataset_that_is_split_by_node_is_not_split_again():
    from datasets.distributed import split_dataset_by_node

    rows = datasets.Dataset.from_dict({"input_ids": SAMPLES}).to_iterable_dataset(2)
    half = split_dataset_by_node(rows, rank=0, world_size=2)
    with pytest.raises(ValueError, match="world_size must be 1, got 2: the dataset is already"):
        next(iter(pack_stream(half, 8, rank=0, world_size=2, uneven_rows="allow")))


def test_the_index_that_an_iterable_dataset_inherits_is_not_used():
    assert len(list(pack_stream(Misses(), 200))) == 1


# ------------------------------------------------------------------------------- rows for each rank


def rows_of(rank, world_size, uneven_rows, source=SAMPLES, state=None, **options):
    stream = pack_stream(
        source, 8, "obfd", rank=rank, world_size=world_size, uneven_rows=uneven_rows,
        **{"lookahead": 6, **options},
    )  # fmt: skip
    if state is not None:
        stream.load_state_dict(state)
    rows, states = [], [stream.state_dict()]
    for row in stream:
        rows.append(tuple(row["input_ids"].tolist()))
        states.append(stream.state_dict())
    return rows, states, stream


def test_unequal_ranks_are_announced():
    with pytest.warns(UserWarning, match="DDP waits for a rank that ends early"):
        pack_stream(SAMPLES, 8, rank=0, world_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack_stream(SAMPLES, 8, rank=0, world_size=2, uneven_rows="allow")
        pack_stream(SAMPLES, 8)


@pytest.mark.parametrize("world_size", [2, 3, 5, 64])
@pytest.mark.parametrize("source", ["list", "iterable dataset"])
def test_every_rank_gets_the_same_number_of_rows(world_size, source):
    made = SAMPLES
    if source == "iterable dataset":
        made = datasets.Dataset.from_dict({"input_ids": SAMPLES}).to_iterable_dataset(3)
    whole, _, _ = rows_of(0, 1, "warn", made)
    for ending in ("drop", "repeat"):
        ranks = [rows_of(rank, world_size, ending, made) for rank in range(world_size)]
        assert len({len(rows) for rows, _, _ in ranks}) == 1
        given = [row for rows, _, _ in ranks for row in rows]
        counts = [stream.counts[0] for _, _, stream in ranks]
        missing = sum(each.rows_dropped for each in counts)
        extra = sum(each.rows_repeated for each in counts)
        assert len(given) == len(whole) - missing + extra
        assert missing == (len(whole) % world_size if ending == "drop" else 0)
        assert extra == (-len(whole) % world_size if ending == "repeat" else 0)
        assert set(given) <= set(whole)
        if ending == "repeat":
            assert set(given) == set(whole)


@pytest.mark.parametrize("ending", ["drop", "repeat"])
@pytest.mark.parametrize("lookahead", [3, 11, 1000])
def test_equal_ranks_resume_after_any_row(ending, lookahead):
    for rank in (0, 3):
        whole, states, _ = rows_of(rank, 4, ending, lookahead=lookahead)
        assert len(whole) > 2
        for at, state in enumerate(states):
            if state["position"] is not None:
                again, _, _ = rows_of(rank, 4, ending, state=state, lookahead=lookahead)
                assert again == whole[at:], at


def test_the_deal_by_hand():
    windows, ranks = [3, 0, 1, 1, 6, 0], 4  # 11 rows: two whole groups, and three rows over
    got = {}
    for rank in range(ranks):
        deal, taken, before = RowDeal(rank, ranks, True, beginning()), [], 0
        for at, count in enumerate(windows):
            deal.open(at)
            waiting, due, rest = deal.due(count)
            taken += [row["n"] for row in waiting] + [before + n for n in due]
            for _ in (*waiting, *due):
                deal.advance()
            for n in rest:
                deal.hold(n, {"n": before + n})
            deal.close(count)
            before += count
        got[rank] = taken + [row["n"] for row in deal.last()]
    assert got == {0: [0, 4, 8], 1: [1, 5, 9], 2: [2, 6, 10], 3: [3, 7, 8]}
