"""Facts about this machine, and the versions of installed packages."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import tokenpack

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "datasets",
    "pyarrow",
    "numpy",
    "flash-attn",
)


def versions() -> dict[str, str]:
    """Versions of Python, of tokenpack and of the packages that its behavior depends on."""
    found = {"python": platform.python_version(), "tokenpack": tokenpack.__version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    # The metadata lack the build tag (+cpu, +cu128).
    found["torch"] = torch.__version__
    return found


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory and GPUs, for measurements. Contains no host name and no path."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "physical_cores": physical_cores(),
        "memory_gib": memory_gib(),
        "gpus": [
            torch.cuda.get_device_properties(i).name for i in range(torch.cuda.device_count())
        ],
        "cuda": torch.version.cuda,
    }


def cpu_name() -> str:
    """The model name of the processor, if the system reports it."""
    for line in _read_lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory_gib() -> float | None:
    """Memory of the machine in GiB, if the system reports it."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def physical_cores() -> int:
    """Physical cores that this process may use.

    The hardware threads of a core share its multipliers, so a second thread does not speed up
    matrix products. Respects the affinity mask and the CPU limit of a container.
    """
    if hasattr(os, "sched_getaffinity"):
        usable = os.sched_getaffinity(0)
    else:
        usable = set(range(os.cpu_count() or 1))
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    # Without topology information, each processor counts as a core.
    siblings = {"".join(_read_lines(topology.format(cpu))) or str(cpu) for cpu in usable}
    return max(1, min(len(siblings), _container_processors() or len(siblings)))


def _container_processors() -> int | None:
    """Processors that a cgroup (version 2) allows, ``None`` without a limit."""
    for line in _read_lines("/sys/fs/cgroup/cpu.max"):
        quota, period = line.split()
        if quota != "max":
            return max(1, int(quota) // int(period))
    return None


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
