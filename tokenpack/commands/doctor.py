"""``tokenpack doctor``: versions, devices, and which attention backends can run here."""

from __future__ import annotations

import argparse

import torch

from ..attention import backend_report
from ..table import format_table
from . import machine


def run(arguments: argparse.Namespace) -> int:
    """Print the report. Returns 0, because a backend that cannot run is not an error."""
    print("versions")
    print(_indent([f"{name:<13} {version}" for name, version in machine.versions().items()]))
    print("\ndevices")
    print(_indent(_describe_devices()))
    for device in _devices():
        rows = [
            [status.name, "yes" if status.usable else "no", status.reason]
            for status in backend_report(device)
        ]
        width = max(len(reason) for *_, reason in rows)
        rows = [[name, usable, reason.ljust(width)] for name, usable, reason in rows]
        print(f"\nattention backends on {device.type}")
        print(_indent(format_table(["backend", "usable", "why".ljust(width)], rows).splitlines()))
    return 0


def _devices() -> list[torch.device]:
    return [torch.device(name) for name in ["cpu"] + ["cuda"] * torch.cuda.is_available()]


def _describe_devices() -> list[str]:
    cores = machine.physical_cores()
    lines = [f"{'cpu':<13} {machine.cpu_name()}, {cores} physical cores, {_torch_threads()}"]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        lines.append(
            f"{f'cuda:{i}':<13} {gpu.name}, sm_{gpu.major}{gpu.minor}, "
            f"{gpu.total_memory / 2**30:.0f} GiB"
        )
    if not torch.cuda.device_count():
        cuda = torch.version.cuda
        why = f"torch is built for CUDA {cuda}, but sees no GPU" if cuda else "torch is a CPU build"
        lines.append(f"{'cuda':<13} none: {why}")
    return lines


def _torch_threads() -> str:
    """The number of torch's CPU threads, in words."""
    return f"torch uses {torch.get_num_threads()} threads"


def _indent(lines: list[str]) -> str:
    return "\n".join(f"  {line}".rstrip() for line in lines)
