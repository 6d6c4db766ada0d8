"""The rules of the house that a reader would otherwise have to watch over."""

import ast
import importlib
import importlib.metadata
import json
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

import blemish
from blemish import errors

SOURCE = Path(blemish.__file__).parent
ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = (
    *("errors", "types", "files", "tables", "progress", "seeding", "devices", "images", "demo"),
    *("data", "data.check", "data.folds", "data.split", "data.shapes", "data.defects"),
    *("detectors.registry", "detectors.settings", "detectors.sizing", "training.advice"),
    *("inference.predictor", "inference.bulk", "inference.recalibration", "inference.measure"),
    *("inference.engines.onnxruntime", "inference.engines.openvino", "evaluation.run"),
    *("evaluation.report", "sweeps.repeats", "sweeps.summary", "benchmark.run", "benchmark.tables"),
    *("cli.main", "cli.terminal"),
)
"""Modules that a PC without torch can import."""
TRAINING_ONLY = {"torch", "safetensors", "scipy", "onnx", "onnxscript", "onnx_ir", "typing_extensions"}
"""Packages that `blemish[train]` adds."""
HEAVY = TRAINING_ONLY | {
    *("numpy", "PIL", "onnxruntime", "cc3d", "jinja2", "tqdm", "platformdirs", "msgspec"),
}
PACKAGES = {
    "PIL": "pillow",
    "cc3d": "connected-components-3d",
    "onnx_ir": "onnx-ir",
    "sklearn": "scikit-learn",
}
"""Packages whose name on the index is not that of their module."""
EMPTY = ("training", "detectors", "data.loading")
"""Wings whose __init__ holds a docstring and nothing else."""


def script(name: str) -> ModuleType:
    """Import a script of the project."""
    loader = SourceFileLoader(name, str(ROOT / "scripts" / name))
    spec = spec_from_loader(name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    loader.exec_module(module)
    return module


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def modules() -> Iterator[tuple[str, Path]]:
    """Yield the dotted name below `blemish` and the file of every module but the package's own."""
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            yield name, path


def imports(path: Path) -> set[str]:
    """Return what a file imports anywhere: dotted modules, and for `from a import b` also a.b."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Yield every call with the dotted text of what is called."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


# --- structure ---


def test_imports_go_one_way() -> None:
    tiers = script("house").tiers()
    level = {wing: number for number, tier in enumerate(tiers) for wing in tier}
    assert sorted(level) == sorted({name.split(".")[0] for name, _ in modules()})
    for name, path in modules():
        own = name.split(".")[0]
        wings = {each.split(".")[1] for each in imports(path) if each.startswith("blemish.")}
        for wing in wings & level.keys() - {own}:
            assert level[wing] < level[own], f"{name} imports {wing}"


def test_imports_within_a_wing_make_no_circle() -> None:
    known = {name for name, _ in modules()}
    uses = {
        name: {each.removeprefix("blemish.") for each in outer(path)} & known - {name}
        for name, path in modules()
    }
    done: set[str] = set()
    while ready := {name for name in uses.keys() - done if uses[name] - packages_of(name) <= done}:
        done |= ready
    assert not uses.keys() - done, {name: uses[name] - done for name in uses.keys() - done}


def packages_of(name: str) -> set[str]:
    """Return the packages that a module lies in, which are imported before it."""
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}


def outer(path: Path) -> set[str]:
    """Return what is imported when a file is, leaving out functions and what only types need."""
    found: set[str] = set()
    for node in parsed(path).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_structure_keeps_its_aims() -> None:
    for count in script("house").measure():
        assert count.value <= count.aim, f"{count.name}: {count.value} {count.found}"


def test_the_count_of_the_structure_can_fail() -> None:
    house = script("house")
    tree = ast.parse("def f(a, b):\n    return 1\n\n\nNAME = 'efficientad-s'\n")
    (function,) = house.functions_of(tree)
    assert (house.length(function), house.parameters(function)) == (2, 2)
    path = SOURCE / "images" / "reading.py"
    assert not list(house.naming_methods({path: parsed(path)}))
    named = SOURCE / "detectors" / "efficientad" / "config.py"
    assert not list(house.naming_methods({named: parsed(named)}))  # its own place
    assert house.METHODS.search("isinstance(detector, EfficientAD)")
    assert house.METHODS.search('"supersimplenet"')


def test_empty_wings_hold_nothing_but_a_docstring() -> None:
    for name in EMPTY:
        path = SOURCE / name.replace(".", "/") / "__init__.py"
        assert [type(node) for node in parsed(path).body] == [ast.Expr], name


def test_docstrings_say_what_comes_out() -> None:
    for name, path in modules():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node) or ""
                assert not re.match(r"(Give|Say)\b", text), f"{name}: {text.splitlines()[0]}"


def test_only_one_wing_touches_the_image_library() -> None:
    using = {name for name, path in modules() if any(each.split(".")[0] == "PIL" for each in imports(path))}
    assert {name.split(".")[0] for name in using} == {"images"}


def test_only_one_file_asks_the_network() -> None:
    network = {"urllib.request", "http", "http.client", "socket", "ssl", "requests", "ftplib"}
    using = {name for name, path in modules() if imports(path) & network}
    assert using == {"backbones.weights"}


def test_the_library_prints_nothing_and_handles_no_signals() -> None:
    for name, path in modules():
        if name.startswith("cli"):
            continue
        for called, call in calls(path):
            to_file = any(keyword.arg == "file" for keyword in call.keywords)
            assert called != "print" or to_file, f"{name} prints"
            # A benchmark's own processes leave Ctrl-C to their parent.
            assert not called.startswith("signal.") or name == "benchmark.run", f"{name} handles a signal"
        text = path.read_text(encoding="utf-8")
        assert "sys.stdout" not in text, name
        assert "sys.stderr" not in text, name


# --- what is imported when ---


def modules_after(program: str) -> set[str]:
    """Run a program in a fresh interpreter; return the packages that are then imported."""
    ending = "\nimport sys, json; print(json.dumps(sorted({n.partition('.')[0] for n in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", program + ending], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_what_the_line_needs_imports_no_torch() -> None:
    """Where the packages of the extra `train` cannot be imported, everything for the line can."""
    missing = f"import sys\nsys.modules.update(dict.fromkeys({sorted(TRAINING_ONLY)}))\n"
    program = missing + "\n".join(f"import blemish.{name}" for name in WITHOUT_TORCH)
    names = ("load", "evaluate", "calibrate", "check", "Predictor")
    program += "\nimport blemish\n" + "\n".join(f"blemish.{name}" for name in names)
    assert "blemish" in modules_after(program)


def test_help_and_the_bare_package_import_nothing_heavy() -> None:
    assert not modules_after("import blemish, blemish.cli.main") & HEAVY
    for words in (["--help"], ["train", "--help"], ["benchmark", "--help"], ["--version"]):
        program = f"from blemish.cli.main import main\ntry: main({words})\nexcept SystemExit: pass"
        assert not modules_after(program) & HEAVY


def test_every_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + [line for group in extras.values() for line in group]
    declared = {re.split(r"[\[<>=!~ ]", line)[0].lower() for line in lines}
    for _, path in modules():
        for name in {each.split(".")[0] for each in imports(path)} - set(sys.stdlib_module_names):
            assert name == "blemish" or PACKAGES.get(name, name) in declared, f"{path} imports {name}"


# --- the public surface ---


def test_every_public_name_is_there() -> None:
    assert blemish.__all__ == sorted(blemish.__all__)
    assert set(blemish.__all__) == {*blemish._HOMES, "__version__"}
    for name, home in blemish._HOMES.items():
        assert getattr(blemish, name) is getattr(importlib.import_module(f"blemish.{home}"), name)


def test_type_checkers_see_the_same_names() -> None:
    (block,) = [node for node in parsed(SOURCE / "__init__.py").body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module.removeprefix("blemish.")
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert seen == blemish._HOMES


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'blemish' has no attribute 'Engine'"):
        blemish.Engine  # noqa: B018


def test_the_version_is_that_of_the_package() -> None:
    assert importlib.metadata.version("blemish") == blemish.__version__


# --- safety and failure ---


def test_nothing_is_unpickled() -> None:
    for name, path in modules():
        for called, call in calls(path):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert called.split(".")[0] not in ("pickle", "shelve", "joblib", "marshal", "dill"), name
            assert called not in ("eval", "exec", "compile", "__import__"), name
            assert called != "torch.load" or given.get("weights_only") == "True", name
            assert called not in ("np.load", "np.save") or given.get("allow_pickle") == "False", name
        assert not imports(path) & {"pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"}, name
    used = {name for name, path in modules() if "pickle" in imports(path)}
    assert used == {"backbones.weights"}  # for the error that torch.load raises


def test_sources_hold_no_assertions() -> None:
    for name, path in modules():
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(parsed(path))), name


def test_no_failure_is_caught_wholesale() -> None:
    """But for one: the command line gives an internal error its own exit status, with its traceback."""
    found = [
        name
        for name, path in modules()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ExceptHandler)
        and (ast.unparse(node.type) if node.type else "") in ("", "Exception", "BaseException")
    ]
    assert found == ["cli.main"]


def test_every_error_is_in_the_tree() -> None:
    classes = {value for value in vars(errors).values() if isinstance(value, type)}
    assert all(issubclass(each, errors.BlemishError) for each in classes)
    tree = errors.__doc__ or ""
    listed = [line.split("── ")[1].split()[0] for line in tree.splitlines() if "── " in line]
    assert sorted(listed) == sorted(each.__name__ for each in classes - {errors.BlemishError})


# --- the tests themselves ---


def test_tests_reach_no_other_machine() -> None:
    with pytest.raises(PermissionError, match="asked the network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(PermissionError, match=r"asked the network for example\.org"):
        socket.getaddrinfo("example.org", 443)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams, pytest.raises(PermissionError):
        datagrams.sendto(b"", ("192.0.2.1", 53))


def test_tests_reach_their_own_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
