"""``python -m tokenpack``: the same as the ``tokenpack`` command."""

import sys

from .cli import main

sys.exit(main())
