"""The error inside the adapters that makes a call run padded."""


class CannotPackError(Exception):
    """This call must run padded. The message is the reason that `packing_stats` counts."""
