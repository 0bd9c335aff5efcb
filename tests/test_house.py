"""The house: a room takes from lower rooms what they hand out, as docs/design.md says; only the command line prints."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import compressor

_SPEC = importlib.util.spec_from_file_location("draw_house", Path(__file__).parents[1] / "docs" / "draw_house.py")
assert _SPEC
assert _SPEC.loader
house = importlib.util.module_from_spec(_SPEC)
sys.modules["draw_house"] = house  # where dataclasses look up the module of their annotations
_SPEC.loader.exec_module(house)

MODULES = house.modules()
ROOMS = house.rooms()
NUMBER = {name: room.number for room in ROOMS for name in room.names}
HEAVY = {
    *("torch", "torchvision", "torch_pruning", "onnx", "onnxruntime", "onnxscript", "fvcore", "safetensors", "sklearn"),
    *("openvino", "timm", "scipy", "rich", "jinja2", "PIL", "msgspec", "filelock"),
}
# What a rule of `test_a_room_hands_out_what_others_take` cannot say: the package's own list of names.
PUBLIC = "compressor's own list of names"


def test_the_table_names_every_room_once() -> None:
    there = {path.name.removesuffix(".py") for path in house.PACKAGE.iterdir() if path.suffix in ("", ".py")}
    listed = [name for room in ROOMS for name in room.names]
    assert sorted(listed) == sorted(there - {"__init__", "__pycache__"})
    assert [room.number for room in ROOMS] == list(range(13))


@pytest.mark.parametrize("module", sorted(set(MODULES) - {""}))
def test_a_room_imports_only_from_rooms_that_its_row_names(module: str) -> None:
    here = NUMBER[house.room(module)]
    allowed = next(room.may_import for room in ROOMS if room.number == here)
    for used in house.imports(MODULES[module]):
        there = NUMBER[house.room(house.used_module(used, MODULES))]
        assert there == here or there in allowed, f"{module} imports {used.target}.{used.name}"


@pytest.mark.parametrize("module", sorted(set(MODULES) - {""}))
def test_a_room_takes_from_another_only_what_that_one_hands_out(module: str) -> None:
    for used in house.imports(MODULES[module]):
        other = house.used_module(used, MODULES)
        if house.room(other) == house.room(module) or other == "errors":
            continue
        if used.target == "":  # `from compressor import budget`: the room itself, whose names are looked up when used
            assert used.name in NUMBER, f"{module} imports {used.name} from {PUBLIC}"
            continue
        handed_out = importlib.import_module(f"compressor.{house.room(other)}").__all__
        assert used.target == house.room(other), f"{module} reaches into {used.target}: import from the room"
        assert used.name in handed_out, f"{module} takes {used.name}, which {used.target} does not hand out"
        assert not used.name.startswith("_")


@pytest.mark.parametrize("room", [name for name in NUMBER if (house.PACKAGE / name).is_dir()])
def test_no_room_has_a_cycle_inside(room: str) -> None:
    mine = {name: path for name, path in MODULES.items() if name.startswith(f"{room}.")}
    takes = {
        name: {house.used_module(used, MODULES) for used in house.imports(path)} & mine.keys() - {name}
        for name, path in mine.items()
    }
    try:
        list(TopologicalSorter(takes).static_order())
    except CycleError as error:
        pytest.fail(f"a cycle in {room}: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("room", [name for name in NUMBER if (house.PACKAGE / name / "__init__.pyi").exists()])
def test_every_name_that_a_room_hands_out_is_there_and_no_module_hides_it(room: str) -> None:
    package = importlib.import_module(f"compressor.{room}")
    for name in package.__all__:
        getattr(package, name)
        is_module = f"{room}.{name}" in MODULES
        assert not is_module or getattr(package, name).__name__ == f"compressor.{room}.{name}"


# `__main__` imports the rest where Ctrl-C is caught.
@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"__main__"}))
def test_functions_import_only_what_is_heavy_and_not_ours(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in (each for function in functions for each in ast.walk(function)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            assert (name or "").split(".")[0] in HEAVY, f"{module}:{node.lineno} imports {name} inside a function"


def test_the_picture_of_the_house_is_the_code() -> None:
    assert house.PICTURE.read_text(encoding="utf-8") == house.picture(), "run: python docs/draw_house.py"


@pytest.mark.parametrize("name", compressor.__all__)
def test_every_public_name_is_one_that_a_room_hands_out(name: str) -> None:
    value = getattr(compressor, name)
    home = sys.modules[f"compressor.{house_of(name)}"]
    assert getattr(home, name) is value


def house_of(name: str) -> str:
    """The room that hands out a public name."""
    (room,) = (room for room in NUMBER if name in getattr(sys.modules.get(f"compressor.{room}"), "__all__", ()))
    return room


def test_an_unknown_public_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"has no attribute 'purne'; it has .*prune"):
        compressor.purne  # noqa: B018


def test_importing_compressor_and_the_command_line_does_not_import_torch() -> None:
    code = "import sys, compressor, compressor.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_the_command_line_prints_or_exits() -> None:
    for module, path in MODULES.items():
        if module in ("cli", "console", "__main__"):
            continue
        calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)}
        assert not calls & {"print", "sys.exit", "exit", "quit", "os._exit"}, module
