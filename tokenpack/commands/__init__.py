"""The commands of ``tokenpack``, one module each with a ``run(arguments) -> exit code``.

    demo.py      trains padded and patched models side by side
    doctor.py    what is installed, which attention backends run
    inspect.py   lengths and padding of a file, and how full each strategy packs it
    pack.py      files to packed rows

and what they share: the models (``models.py``), the training of a pair (``side_by_side.py``), all
strategies on the same lengths (``strategies.py``), the user's tokenizer (``tokenizer.py``), facts
about the machine (``machine.py``), tables, figures and files (``table.py``, ``figures.py``,
``output.py``).
"""

import os

# torch's profiler, which measures the demo's memory, otherwise reports its own starts and stops on
# stderr. Read when torch is loaded, hence here.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")
