"""The rooms of the house, the imports between them, and the size of what is in them.

`python tests/structure.py` prints two tables: each room with the rooms that it imports, and the
largest files and functions. `test_structure.py` holds both to their limits.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

# Each room, lowest first, with the rooms that its files may import. A room is a folder or a file of
# `tokenpack/`, or `kernels/`, which is installed as `tokenpack.kernels`. Each model in
# `tokenpack/models/` is a room of its own, and so is the condenser's trainer, which is above the
# other trainers and the condenser. "tokenpack" itself is `tokenpack/__init__.py`.
# docs/design.md draws the same arrows.
ROOMS: dict[str, tuple[str, ...]] = {
    "kernels": (),
    "checks": (),
    "segments": (),
    "files": (),
    "table": (),
    "packing": ("checks", "segments", "files"),
    "attention": ("kernels",),
    "adapters": ("attention", "kernels", "checks", "segments"),
    "cost": ("attention", "kernels", "checks"),
    "comparison": ("adapters", "cost", "kernels", "checks", "table"),
    "diagnostics": ("table",),
    "tokenpack": ("adapters", "comparison", "diagnostics"),
    "models": (),
    "models.decoder": ("attention", "kernels", "checks"),
    "models.condenser": ("adapters", "kernels", "checks", "segments"),
    "data": ("packing", "checks", "segments", "files"),
    "samples": ("data", "checks"),
    "trainer": ("adapters", "data", "packing", "kernels", "checks", "segments", "files"),
    "trainer.condense": ("trainer", "models.condenser", "data", "checks"),
    "metrics": (),
    "commands": (
        *("trainer", "trainer.condense", "models.condenser", "models.decoder", "cost", "samples"),
        *("data", "packing", "adapters", "attention"),
        *("tokenpack", "checks", "segments", "files", "table"),
    ),
    "cli": ("commands", "tokenpack"),
    "__main__": ("cli",),
}


@functools.cache
def modules(root: Path = ROOT) -> dict[str, Path]:
    """The product's modules by dotted name."""
    found = {}
    for folder, package in (
        (root / "tokenpack", "tokenpack"),
        (root / "kernels", "tokenpack.kernels"),
    ):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


def room_of(module: str) -> str:
    """The room that a module is in."""
    parts = module.split(".")
    if parts[1:2] == ["models"] or ".".join(parts[1:3]) in ROOMS:
        return ".".join(parts[1:3])
    return parts[1] if len(parts) > 1 else parts[0]


@functools.cache
def imports(root: Path = ROOT) -> dict[str, set[str]]:
    """For each module the modules that it imports, anywhere in it: in functions and under
    TYPE_CHECKING too."""
    known = modules(root)
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        graph[module] = {
            target
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            for target in _targets(node, package, known)
            if target != module
        }
    return graph


def _targets(node: ast.AST, package: str, known: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in known)
    elif isinstance(node, ast.ImportFrom):
        parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*parts, *([node.module] if node.module else [])])
        for alias in node.names:
            name = f"{base}.{alias.name}"
            if name in known or base in known:
                yield name if name in known else base


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Import circles: each a list of modules in which each imports the next and the last the first.

    One circle is reported for each back edge of a depth-first walk, so the list is empty exactly if
    there is no circle.
    """
    found: list[list[str]] = []
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> None:
        if module in path:
            found.append(path[path.index(module) :])
        elif module not in done:
            path.append(module)
            for target in sorted(graph.get(module, ())):
                visit(target)
            done.add(path.pop())

    for module in sorted(graph):
        visit(module)
    return found


def forbidden(graph: dict[str, set[str]]) -> list[str]:
    """Imports that follow no arrow of `ROOMS`, as "importer -> imported"."""
    return [
        f"{module} -> {target}"
        for module, targets in graph.items()
        for target in sorted(targets)
        if room_of(target) != room_of(module)
        and room_of(target) not in ROOMS.get(room_of(module), ())
    ]


class Function(NamedTuple):
    """A function's size.

    Attributes:
        name: file and qualified name.
        lines: lines without the docstring, decorators not counted.
        parameters: number of parameters, ``self`` and ``cls`` not counted.
        public: whether the signature belongs to the user's API: a public name in an ``__all__``, or
            a public method of one.
    """

    name: str
    lines: int
    parameters: int
    public: bool


@functools.cache
def functions(root: Path = ROOT) -> list[Function]:
    """All functions of the product."""
    public = {name for path in modules(root).values() for name in _exported(path)}
    found = []
    for path in modules(root).values():
        where = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [_measured(node, where, scope, public) for node, scope in _scoped(tree, ())]
    return found


def _exported(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in (
            "__all__",
            "_HOMES",
        ):
            names = node.value.keys if isinstance(node.value, ast.Dict) else [node.value]
            for name in names:
                yield from (n.value for n in ast.walk(name) if isinstance(n, ast.Constant))


def _scoped(
    node: ast.AST, scope: tuple[str, ...]
) -> Iterator[tuple[ast.FunctionDef, tuple[str, ...]]]:
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child, (*scope, child.name)
        inner = (*scope, child.name) if isinstance(child, definitions) else scope
        yield from _scoped(child, inner)


def _measured(
    node: ast.FunctionDef, where: str, scope: tuple[str, ...], public: set[str]
) -> Function:
    first = node.body[0]
    docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
    given = node.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    names += [a.arg for a in (given.vararg, given.kwarg) if a]
    return Function(
        f"{where}:{'.'.join(scope)}",
        node.end_lineno - node.lineno + 1 - docstring,
        len([name for name in names if name not in ("self", "cls")]),
        scope[0] in public and all(not s.startswith("_") or s == "__init__" for s in scope),
    )


def line_counts(root: Path = ROOT) -> dict[str, int]:
    """Lines of each file of the product."""
    return {
        path.relative_to(root).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in modules(root).values()
    }


def main() -> None:
    """Print the two tables."""
    graph = imports()
    print(
        f"{len(graph)} files, {sum(line_counts().values()):,} lines, {len(functions())} functions"
    )
    print(f"import circles: {len(circles(graph))}; forbidden imports: {len(forbidden(graph))}\n")
    print(f"{'room':14} {'files':>5} {'lines':>6}  imports")
    sizes = line_counts()
    for room in ROOMS:
        inside = [module for module in graph if room_of(module) == room]
        lines = sum(sizes[modules()[m].relative_to(ROOT).as_posix()] for m in inside)
        used = {room_of(target) for module in inside for target in graph[module]} - {room}
        print(f"{room:14} {len(inside):5} {lines:6}  {', '.join(r for r in ROOMS if r in used)}")
    print("\nlargest files")
    for name, lines in sorted(sizes.items(), key=lambda item: -item[1])[:10]:
        print(f"{lines:6}  {name}")
    for title, key in (("longest functions", "lines"), ("most parameters", "parameters")):
        print(f"\n{title}")
        for function in sorted(functions(), key=lambda f: -getattr(f, key))[:20]:
            note = "  (public)" if function.public else ""
            print(f"{getattr(function, key):6}  {function.name}{note}")


if __name__ == "__main__":
    main()
