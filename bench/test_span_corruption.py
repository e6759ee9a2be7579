"""T5's span corruption, from token lists to a padded batch, compared with a loop in NumPy.

The loop is what a collator that follows T5's code does: for each sample it draws a random mask and
builds source and target; then it pads both into rows. This suite always runs on the CPU.
"""

import types

import numpy as np
import pytest
import torch

from tokenpack.data import Denoiser, T5SpanCorruptionCollatorFast

ROWS, PAD, EOS, SENTINELS = 256, 0, 1, range(32099, 31999, -1)
LENGTHS = {"512": (512, 512), "64 to 512": (64, 512), "4 to 40": (4, 40)}

pytestmark = pytest.mark.benchmark(max_time=0.5, min_rounds=20)


def make_samples(shape, kind):
    """Samples with lengths uniform over a range, the same on every machine."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(LENGTHS[shape][0], LENGTHS[shape][1] + 1, ROWS)
    rows = [rng.integers(2, 32000, length) for length in lengths]
    if kind == "arrays":
        return [{"input_ids": row} for row in rows]
    lists = [row.tolist() for row in rows]
    if kind == "lists":
        return [{"input_ids": row} for row in lists]
    dataset = pytest.importorskip("datasets").Dataset.from_dict({"input_ids": lists})
    return dataset.__getitems__(list(range(ROWS)))  # as a DataLoader calls it; returns lists


def random_parts(total, parts, rng):
    """Positive integers whose sum is ``total``; all such lists are equally likely."""
    starts = np.zeros(total, bool)
    starts[1:parts] = True
    rng.shuffle(starts[1:])
    return np.bincount(np.cumsum(starts))


def random_mask(length, rng):
    """True at noise tokens: 15 % of them, in spans of 3 on average."""
    noise = min(max(round(length * 0.15), 1), length - 1)
    spans = max(round(noise / 3), 1)
    alternating = np.stack(
        [random_parts(length - noise, spans, rng), random_parts(noise, spans, rng)], axis=1
    )
    return np.repeat(np.arange(2 * spans) % 2 == 1, alternating.reshape(-1))


def with_sentinels(ids, masked):
    """Replace each masked span by a sentinel, and append EOS."""
    first = masked & ~np.concatenate([[False], masked[:-1]])
    ids = np.where(first, SENTINELS[0] + 1 - np.cumsum(first), ids)
    return np.append(ids[first | ~masked], EOS)


def pad(rows, fill):
    """Pad on the right to a multiple of 8 columns."""
    columns = -(-max(map(len, rows)) // 8) * 8
    padded = np.full((len(rows), columns), fill, np.int64)
    for row, ids in zip(padded, rows):
        row[: len(ids)] = ids
    return torch.from_numpy(padded)


def collate_in_a_loop(samples, rng):
    """Corrupt and pad, sample by sample."""
    sources, targets = [], []
    for sample in samples:
        ids = np.asarray(sample["input_ids"])
        mask = random_mask(len(ids), rng)
        sources.append(with_sentinels(ids, mask))
        targets.append(with_sentinels(ids, ~mask))
    ids = pad(sources, PAD)
    lengths = torch.tensor([len(row) for row in sources])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": pad(targets, -100)}


@pytest.mark.parametrize("kind", ["arrays", "lists", "rows of a dataset"])
@pytest.mark.parametrize("shape", LENGTHS)
@pytest.mark.parametrize("by", ["loop", "tokenpack", "tokenpack, packed", "tokenpack, mixture"])
def test_collate(benchmark, by, shape, kind):
    """Make a batch from samples."""
    benchmark.group = f"corrupt {ROWS} samples of {shape} tokens, {kind}"
    samples = make_samples(shape, kind)
    if by == "loop":
        rng = np.random.default_rng(0)
        benchmark(lambda: collate_in_a_loop(samples, rng))
        return
    tokenizer = types.SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS, padding_side="right")
    mixture = [Denoiser(), Denoiser(0.5, 8.0), Denoiser(0.25, None)] if "mixture" in by else None
    collate = T5SpanCorruptionCollatorFast(
        tokenizer, packed="packed" in by, denoisers=mixture, sentinel_ids=SENTINELS
    )
    batch = benchmark(lambda: collate(samples))
    benchmark.extra_info["tokens"] = int(batch["input_ids"].ne(PAD).sum())
