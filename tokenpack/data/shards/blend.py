"""A blend of several sources by weight, with exact counts.

Source j gives ``c_j`` of the ``N`` samples of an epoch: its share of ``N``, rounded so that the
counts add up (largest remainder). Its samples are spread evenly: sample k of source j is at time
``(2 k + 1) / (2 c_j)``, and the blend takes the samples of all sources in the order of their times.
So after n samples, each source has given about its share of n. Sample n is found from its number
alone, with integers: the times before ``n / N`` are counted, and a few steps correct the count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from ...checks import at_least_one
from .samples import Row, ShardSamples


def blend_shards(
    sources: Mapping[str, ShardSamples] | Sequence[ShardSamples],
    weights: Mapping[str, float] | Sequence[float],
    *,
    num_samples: int | None = None,
) -> BlendedSamples:
    """Blend several sources by weight.

    Args:
        sources: what `shard_windows` returned, by name or in a list. All must have rows of the same
            number of slots.
        weights: the share of each source in the samples, of any sum, by the same names or in the
            same order.
        num_samples: samples of an epoch. By default as many as possible so that no source repeats a
            sample within an epoch. A source that gives more samples than it has starts again, in
            the order of its next epoch.

    Returns:
        A dataset like its sources. ``blend.counts`` says how many samples of an epoch are from each
        source. The counts are exact, and sum to ``num_samples``.

    Raises:
        TypeError: if sources or weights are of another type.
        ValueError: if names differ, a weight is not positive, or rows differ in their slots.
    """
    names = list(sources) if isinstance(sources, Mapping) else list(map(str, range(len(sources))))
    given = list(sources.values()) if isinstance(sources, Mapping) else list(sources)
    if not given or not all(isinstance(each, ShardSamples) for each in given):
        raise TypeError(f"sources must be what shard_windows returned, got {sources!r:.80}")
    if isinstance(sources, Mapping) != isinstance(weights, Mapping):
        raise TypeError("weights must be a mapping if sources is one, and a list if it is a list")
    if isinstance(weights, Mapping) and set(weights) != set(names):
        raise ValueError(f"weights must name {', '.join(names)}, got {', '.join(weights)}")
    if len(weights) != len(given):
        raise ValueError(f"weights must be {len(given)} numbers, got {len(weights)}")
    ordered = [weights[name] for name in names] if isinstance(weights, Mapping) else list(weights)
    shares = [_share(name, weight) for name, weight in zip(names, ordered)]
    forms = {(each.slots, each.labels_shifted) for each in given}
    if len(forms) > 1:
        raise ValueError(
            "sources must have rows of the same slots and labels, got (slots, labels_shifted) = "
            f"{', '.join(map(str, sorted(forms)))}"
        )
    shares = [each / sum(shares) for each in shares]
    if num_samples is None:
        num_samples = max(int(min(len(each) / w for each, w in zip(given, shares))), 1)
    counts = _apportion(shares, at_least_one("num_samples", num_samples))
    return BlendedSamples(dict(zip(names, given)), dict(zip(names, counts)))


class BlendedSamples(ShardSamples):
    """Samples of several sources by weight; `blend_shards` returns it.

    Attributes:
        sources: the sources by name.
        counts: how many samples of an epoch are from each source.
    """

    def __init__(self, sources: dict[str, ShardSamples], counts: dict[str, int]) -> None:
        self.sources, self.counts = sources, counts
        self._sources, self._counts = list(sources.values()), list(counts.values())
        first = self._sources[0]
        self.slots, self.labels_shifted = first.slots, first.labels_shifted
        super().__init__(sum(self._counts), 0, 0, False)

    @property
    def options(self) -> dict[str, Any]:
        """See `ShardSamples.options`."""
        parts = {f"source {name}": each.options for name, each in self.sources.items()}
        return {"counts": dict(self.counts), **parts}

    def numbered(self, numbers: Sequence[int]) -> list[Row]:
        """See `ShardSamples.numbered`."""
        return [self._sources[at].sample(number) for at, number in map(self.origin, numbers)]

    def row(self, index: int) -> Row:
        """Sample ``index`` of the first epoch."""
        return self.sample(index)

    def origin(self, number: int) -> tuple[int, int]:
        """Which source a sample is from, and its number there, which counts through all epochs."""
        epoch, place = divmod(int(number), len(self))
        source, within = self._at(place)
        return source, epoch * self._counts[source] + within

    def _at(self, place: int) -> tuple[int, int]:
        counts, total = self._counts, len(self)
        # Samples with (2 k + 1) / (2 c) < place / total.
        taken = [-(-(2 * c * place - total) // (2 * total)) if c else 0 for c in counts]
        taken = [max(each, 0) for each in taken]

        def time(source: int, within: int) -> tuple[Fraction, int]:
            return Fraction(2 * within + 1, 2 * counts[source]), source

        while sum(taken) > place:
            last = max((time(at, k - 1) for at, k in enumerate(taken) if k))[1]
            taken[last] -= 1
        while True:
            following = [time(at, k) for at, k in enumerate(taken) if k < counts[at]]
            source = min(following)[1]
            if sum(taken) == place:
                return source, taken[source]
            taken[source] += 1


def _share(name: str, weight: Any) -> Fraction:
    is_number = isinstance(weight, (int, float, np.number)) and not isinstance(weight, bool)
    if not is_number or not 0 < weight < float("inf"):
        raise ValueError(f"weights must be positive numbers, got {weight!r} for source {name}")
    return Fraction(float(weight))


def _apportion(shares: Sequence[Fraction], total: int) -> list[int]:
    """Whole numbers in proportion to shares that sum to 1, which sum to ``total``."""
    exact = [share * total for share in shares]
    counts = [int(each) for each in exact]
    rest = sorted(range(len(shares)), key=lambda at: (counts[at] - exact[at], at))
    for at in rest[: total - sum(counts)]:
        counts[at] += 1
    return counts
