"""Imports run one way: `docs/ARCHITECTURE.md` says which room may import which, and no files import each other."""

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in ("transact", "bench", "reports", "ablations")
    for path in (ROOT / package).rglob("*.py")
}


@cache
def rooms() -> dict[str, list[str]]:
    """The rooms of the table in its order, each with those that it may import."""
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^|`]+)` \|[^|]*\|([^|]*)\|$", text, re.MULTILINE)
    return {room: re.findall(r"`([^`]+)`", allowed) for room, allowed in rows}


def room_of(module: str) -> str:
    """The room with the longest name that the module's begins with."""
    return max((room for room in rooms() if f"{module}.".startswith(f"{room}.")), key=len)


def file_named(name: str) -> str | None:
    """The module of that name as `FILES` has it, or that which a name is imported from; None for other packages."""
    return next((one for one in (name, f"{name}.__init__") if one in FILES), None)


def imports(module: str) -> set[str]:
    """The modules of ours that a module imports, at whatever place in it."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(file_named(alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
            found.update(file_named(f"{base}.{alias.name}") or file_named(base) for alias in node.names)
    return found - {None}


def test_every_import_is_one_that_the_rooms_allow():
    allowed = rooms()
    wrong = [
        f"{module} imports {other}"
        for module in FILES
        for other in imports(module)
        if room_of(other) not in (room_of(module), *allowed[room_of(module)])
    ]
    assert not wrong


def test_rooms_import_those_above_them_and_files_no_circle():
    order = list(rooms())
    assert all(order.index(one) < order.index(room) for room, allowed in rooms().items() for one in allowed)
    tuple(TopologicalSorter({module: imports(module) for module in FILES}).static_order())  # raises CycleError


def test_the_narrowed_llama_imports_nothing_but_its_configuration():
    assert imports("transact.configuration_transact") == set()
    assert imports("transact.modeling_transact") == {"transact.configuration_transact"}


def test_every_file_says_first_what_it_is():
    assert [name for name, path in FILES.items() if not ast.get_docstring(ast.parse(path.read_text("utf-8")))] == []
