"""Print the folder that figures measured here and now belong in, or are gone on with.

    python -m bench.folder RESULTS      RESULTS/DEVICE-DATE, or RESULTS/DEVICE-DATE-2 and so on

Figures of two commits do not mix: a folder that another commit began is left alone, such as one
that came with the checkout.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# `python -m` put the root on the path, where transformers would take kernels/ for the Hugging Face
# package of that name.
sys.path[:] = [each for each in sys.path if Path(each or ".").resolve() != HERE.parent]

import torch  # noqa: E402


def folder_in(results: Path) -> Path:
    """The first of ``DEVICE-DATE``, ``DEVICE-DATE-2``, ... that is new or of this commit."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    name = f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}-{date}"
    folder, number = results / name, 1
    while (begun := folder / "environment.json").exists():
        if json.loads(begun.read_text(encoding="utf-8")).get("commit") == commit():
            break
        number += 1
        folder = results / f"{name}-{number}"
    return folder


def commit() -> str | None:
    """Of this checkout, abbreviated; None outside of one."""
    command = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    print(folder_in(Path(sys.argv[1])))
