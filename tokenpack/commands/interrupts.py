"""SIGTERM and Ctrl-C as an exception, so that a command removes what it has not finished."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Interrupted(KeyboardInterrupt):
    """A signal that ends the command.

    Attributes:
        number: the signal's number.
        name: the signal's name, such as "SIGTERM".
    """

    def __init__(self, number: int) -> None:
        self.number, self.name = number, signal.Signals(number).name
        super().__init__(self.name)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Raise `Interrupted` for SIGTERM and SIGINT. Handlers of the caller stay in force."""
    with _handled_by(_raise):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore both signals, for a cleanup that must finish."""
    with _handled_by(signal.SIG_IGN):
        yield


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


@contextmanager
def _handled_by(handler: object) -> Iterator[None]:
    """Python allows only the main thread to set handlers; elsewhere this has no effect."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) in (*_DEFAULTS, _raise):
                previous[number] = signal.signal(number, handler)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
