"""The strategies as in textbooks: one sequence at a time, searching all bins. Slow.

Each function takes lengths in input order and returns bins, which are lists of sequence numbers.
"""

import math


class _Bins:
    def __init__(self, lengths, capacity, limit=None):
        self.lengths, self.capacity, self.limit = lengths, capacity, limit or len(lengths)
        self.bins, self.free, self.since = [], [], []
        self.clock = 0

    def fitting(self, i):
        return [
            b
            for b, space in enumerate(self.free)
            if space >= self.lengths[i] and len(self.bins[b]) < self.limit
        ]

    def put(self, i, b=None):
        if b is None:
            b = len(self.bins)
            self.bins.append([])
            self.free.append(self.capacity)
            self.since.append(0)
        self.bins[b].append(i)
        self.free[b] -= self.lengths[i]
        self.clock += 1
        self.since[b] = self.clock


def longest_first(lengths):
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def next_fit(lengths, capacity, limit=None):
    bins = _Bins(lengths, capacity, limit)
    for i in range(len(lengths)):
        last = len(bins.bins) - 1
        bins.put(i, last if last in bins.fitting(i) else None)
    return bins.bins


def first_fit(lengths, capacity, limit=None, order=None):
    bins = _Bins(lengths, capacity, limit)
    for i in order or range(len(lengths)):
        bins.put(i, min(bins.fitting(i), default=None))
    return bins.bins


def best_fit(lengths, capacity, limit=None):
    bins = _Bins(lengths, capacity, limit)
    for i in range(len(lengths)):
        bins.put(i, min(bins.fitting(i), key=lambda b: bins.free[b], default=None))
    return bins.bins


def worst_fit(lengths, capacity, limit=None):
    bins = _Bins(lengths, capacity, limit)
    for i in range(len(lengths)):
        bins.put(i, max(bins.fitting(i), key=lambda b: bins.free[b], default=None))
    return bins.bins


def first_fit_decreasing(lengths, capacity, limit=None):
    return first_fit(lengths, capacity, limit, longest_first(lengths))


def best_fit_decreasing(lengths, capacity, limit=None):
    """Among bins with equal free space, takes the one that has had it the longest."""
    bins = _Bins(lengths, capacity, limit)
    for i in longest_first(lengths):
        bins.put(
            i,
            min(bins.fitting(i), key=lambda b: (bins.free[b], bins.since[b]), default=None),
        )
    return bins.bins


def harmonic(lengths, capacity, limit=None, k=10):
    """Class j holds lengths in (capacity / (j + 1), capacity / j]; the last class is next fit."""
    limit = limit or len(lengths)
    bins, current = [], {}
    for i, length in enumerate(lengths):
        j = min(math.floor(capacity / length), k)
        b = current.get(j)
        full = b is None or len(bins[b]) == limit
        if not full and j < k:
            full = len(bins[b]) == j
        elif not full:
            full = sum(lengths[other] for other in bins[b]) + length > capacity
        if full:
            b = current[j] = len(bins)
            bins.append([])
        bins[b].append(i)
    return bins


def modified_first_fit_decreasing(lengths, capacity):
    """Five passes (Johnson and Garey, 1985)."""
    order = longest_first(lengths)
    large = [i for i in order if lengths[i] > capacity / 2]
    medium = [i for i in order if capacity / 3 < lengths[i] <= capacity / 2]
    small = [i for i in order if capacity / 6 < lengths[i] <= capacity / 3]
    tiny = [i for i in order if lengths[i] <= capacity / 6]
    bins = [[i] for i in large]

    def room(b):
        return capacity - sum(lengths[i] for i in bins[b])

    def longest_that_fits(pool, b):
        return next(i for i in pool if lengths[i] <= room(b))

    def first_of_shortest(pool):
        return next(i for i in pool if lengths[i] == lengths[pool[-1]])

    def move(i, pool, b):
        pool.remove(i)
        bins[b].append(i)

    with_medium = set()
    for b in range(len(bins)):
        if medium and lengths[medium[-1]] <= room(b):
            move(longest_that_fits(medium, b), medium, b)
            with_medium.add(b)
    for b in reversed(range(len(bins))):
        if b in with_medium or len(small) < 2:
            continue
        if lengths[small[-1]] + lengths[small[-2]] <= room(b):
            move(first_of_shortest(small), small, b)
            move(longest_that_fits(small, b), small, b)
    rest = sorted(medium + small + tiny, key=lambda i: (-lengths[i], i))
    for b in range(len(bins)):
        while rest and lengths[rest[-1]] <= room(b):
            move(longest_that_fits(rest, b), rest, b)
    return bins + first_fit(lengths, capacity, None, rest) if rest else bins
