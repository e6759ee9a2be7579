"""Imports run downwards without a circle, and no file or function grows over its limit."""

from pathlib import Path

import pytest

from . import structure
from .structure import ROOMS, circles, forbidden, functions, imports, line_counts, modules, room_of

FILE_LINES = 450
FUNCTION_LINES = 60
KERNEL_LINES = 90
PARAMETERS = 10


def test_every_module_is_in_a_room():
    assert {room_of(module) for module in modules()} == set(ROOMS)


def test_arrows_between_rooms_run_downwards():
    order = list(ROOMS)
    for at, (room, below) in enumerate(ROOMS.items()):
        assert set(below) <= set(order[:at]), room


def test_no_import_follows_no_arrow():
    assert forbidden(imports()) == []


def test_no_import_circle():
    assert circles(imports()) == []


def house(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        "from .two import x",
        "from . import two",
        "from ..packing import two",
        "from tokenpack.packing.two import x",
        "import tokenpack.packing.two",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .two import x",
        "def f():\n    from .two import x",
    ],
)
def test_a_circle_is_found_however_it_is_written(tmp_path, text):
    root = house(
        tmp_path,
        {
            "tokenpack/__init__.py": "",
            "tokenpack/packing/__init__.py": "",
            "tokenpack/packing/one.py": text,
            "tokenpack/packing/two.py": "from .three import y",
            "tokenpack/packing/three.py": "from .one import z",
        },
    )
    (circle,) = circles(imports(root))
    assert {name.rpartition(".")[2] for name in circle} == {"one", "two", "three"}


def test_an_upward_import_is_found(tmp_path):
    root = house(
        tmp_path,
        {
            "tokenpack/packing/plan.py": "from ..data import tokens",
            "tokenpack/data/tokens.py": "from ..packing import plan",
            "kernels/loss.py": "def f():\n    from ..checks import IGNORE_INDEX",
            "tokenpack/checks.py": "",
        },
    )
    assert forbidden(imports(root)) == [
        "tokenpack.packing.plan -> tokenpack.data.tokens",
        "tokenpack.kernels.loss -> tokenpack.checks",
    ]


def test_no_file_is_too_long():
    assert {name: n for name, n in line_counts().items() if n > FILE_LINES} == {}


def test_no_function_is_too_long():
    def limit(function):
        return KERNEL_LINES if function.name.startswith("kernels/") else FUNCTION_LINES

    assert [f for f in functions() if f.lines > limit(f)] == []


def test_no_function_takes_too_many_parameters():
    """Outside `kernels/`, where `torch.library` and Triton's launches dictate flat signatures."""
    outside = [f for f in functions() if not f.name.startswith("kernels/")]
    assert [f for f in outside if f.parameters > PARAMETERS and not f.public] == []


def test_the_design_page_names_every_room():
    page = (structure.ROOT / "docs/design.md").read_text(encoding="utf-8")
    for room in set(ROOMS) - {"tokenpack", "__main__"}:
        path = room.replace(".", "/")
        assert f"{path}/ " in page or f"{path}.py " in page, room
