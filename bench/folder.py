"""Print the results folder for this device, date and commit.

    python -m bench.folder RESULTS      RESULTS/DEVICE-DATE, or RESULTS/DEVICE-DATE-2 and so on

A folder holds results of one commit. A folder of another commit, such as one from the checkout, is
skipped; a folder of this commit is continued.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
from pathlib import Path

import torch


def folder_in(results: Path) -> Path:
    """The first of ``DEVICE-DATE``, ``DEVICE-DATE-2``, ... that is new or of this commit."""
    name = f"{re.sub('[^a-z0-9]+', '-', device().lower()).strip('-')}-{today()}"
    folder, number, here = results / name, 1, commit()
    while (environment := folder / "environment.json").exists():
        if json.loads(environment.read_text(encoding="utf-8")).get("commit") == here:
            break
        number += 1
        folder = results / f"{name}-{number}"
    return folder


def device() -> str:
    """The name of the GPU, or ``cpu``."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def today() -> str:
    """The date in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")


def commit() -> str | None:
    """The abbreviated commit of this checkout; None outside of a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    print(folder_in(Path(sys.argv[1])))
