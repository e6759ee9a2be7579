"""Whether a source of samples asks which worker of a `DataLoader` it runs in.

A `torch.utils.data.IterableDataset` may share its samples among the workers itself: its
``__iter__`` calls `get_worker_info` and uses ``id`` and ``num_workers``. A reader that shares them
again would lose samples. There is no declaration to look at, so `WorkerWatch` records what the
source reads of the object that `get_worker_info` returns.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import get_worker_info

_SHARE = {"id", "num_workers"}  # what a source needs to know its share


class WorkerWatch:
    """A context in which reads of this worker's ``id`` and ``num_workers`` are recorded.

    Outside of a worker, nothing is recorded.
    """

    _active: WorkerWatch | None = None  # one per process: a worker reads one source at a time

    def __init__(self) -> None:
        self._read: set[str] = set()
        info = get_worker_info()
        if info is not None and _Watched not in type(info).__mro__:
            # WorkerInfo refuses assignments, so that users do not change it.
            object.__setattr__(info, "__class__", _watched_class(type(info)))

    @property
    def asked(self) -> bool:
        """Whether the source has read both, as it must to know its share."""
        return self._read >= _SHARE

    def __enter__(self) -> WorkerWatch:
        WorkerWatch._active = self
        return self

    def __exit__(self, *_: object) -> None:
        WorkerWatch._active = None

    def record(self, name: str) -> None:
        """Record that an attribute was read."""
        self._read.add(name)


class _Watched:
    """The base of a class of worker information whose reads are recorded."""

    __slots__ = ()  # Python changes the class of an object only to one of the same layout

    def __getattribute__(self, name: str) -> Any:
        if name in _SHARE and WorkerWatch._active is not None:
            WorkerWatch._active.record(name)
        return super().__getattribute__(name)


def _watched_class(kind: type) -> type:
    body = {"__module__": kind.__module__, "__slots__": ()}
    return type(kind.__name__, (_Watched, kind), body)
