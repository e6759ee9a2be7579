"""The benchmarks and their report."""

import sys
from pathlib import Path

# `python -m` puts the root of the repository on the path, where transformers would mistake kernels/
# for the Hugging Face package of that name.
_ROOT = Path(__file__).parents[1]
sys.path[:] = [each for each in sys.path if Path(each or ".").resolve() != _ROOT]
