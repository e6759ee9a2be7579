"""Run the ``tokenpack`` command as ``python -m tokenpack``."""

import sys

from .cli import main

sys.exit(main())
