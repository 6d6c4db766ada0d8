"""The rules of the house that a reader would otherwise have to watch over."""

import ast
import importlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import blemish
from blemish.detectors import registry

SOURCE = Path(blemish.__file__).parent
TIERS = (
    ("_version", "errors", "ops", "optimisers", "progress", "types"),
    ("calibrate", "files", "flange", "hardware", "machine", "processes", "ranks"),
    ("backbones", "bundle", "checkpoint", "images", "metrics"),
    ("charts", "data", "demo", "detectors", "display"),
    ("fused",),
    ("engines",),
    ("roofline", "runtime"),
    ("evaluation", "predict", "report"),
    ("export",),
    ("contenders", "preflight", "seal"),
    ("benchmark", "loop"),
    ("scoreboard", "training"),
    ("cli_options", "distill", "trials"),
    ("cli_inference",),
    ("cli",),
)
"""Rooms, each importing only from those in tiers above its own."""
WITHOUT_TORCH = (
    *("_version", "errors", "progress", "types", "calibrate", "files", "flange", "ranks", "bundle", "images"),
    *("metrics", "charts", "data", "data.check", "data.folds", "data.split", "demo", "display", "engines"),
    *(
        "engines.onnxruntime",
        "engines.openvino",
        "runtime",
        "evaluation",
        "predict",
        "report",
        "trials",
        "cli",
        "cli_inference",
        "cli_options",
        *("benchmark", "contenders", "machine", "roofline", "scoreboard"),
    ),
)
TRAINING_ONLY = {"torch", "safetensors", "scipy", "onnx", "onnxscript", "typing_extensions"}
"""Packages that `blemish[train]` adds, and one that comes with them."""


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def modules() -> Iterator[tuple[str, Path]]:
    """Give the dotted name below `blemish` and the file of every module but the package's own."""
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            yield name, path


def imports(path: Path) -> set[str]:
    """Give what a file imports anywhere: dotted modules, and for `from a import b` also a.b."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms(path: Path) -> set[str]:
    """Give the rooms of the house that a file imports from."""
    known = {room for tier in TIERS for room in tier}
    return {name.split(".")[1] for name in imports(path) if name.startswith("blemish.")} & known


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Give every call with the dotted text of what is called."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


# --- rooms ---


def test_every_room_has_a_tier() -> None:
    named = [room for tier in TIERS for room in tier]
    assert sorted(named) == sorted({name.split(".")[0] for name, _ in modules()})


def test_imports_go_one_way() -> None:
    level = {room: number for number, tier in enumerate(TIERS) for room in tier}
    for name, path in modules():
        own = name.split(".")[0]
        for room in rooms(path) - {own}:
            assert level[room] < level[own], f"{name} imports {room}"


def test_only_one_room_touches_the_image_library() -> None:
    using = {name for name, path in modules() if any(each.split(".")[0] == "PIL" for each in imports(path))}
    assert using == {"images"}


def test_only_one_file_asks_the_network() -> None:
    network = {"urllib.request", "http", "http.client", "socket", "ssl", "requests", "ftplib"}
    using = {name for name, path in modules() if imports(path) & network}
    assert using == {"backbones.weights"}


def outer_imports(path: Path) -> set[str]:
    """Give the packages that are imported when a file is, leaving out functions and what only types need."""
    found: set[str] = set()
    for node in parsed(path).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_torch_is_imported_where_it_is_said_to_be() -> None:
    using = {name for name, path in modules() if outer_imports(path) & TRAINING_ONLY}
    assert not using & set(WITHOUT_TORCH)
    rest = {name for name, _ in modules()} - set(WITHOUT_TORCH) - using
    # Of the others, these import torch through another room, or nothing heavy at all.
    layouts = {"csv_manifest", "folder", "ksdd2", "loco", "mvtec", "pairs", "saturation", "sensum", "visa"}
    assert rest == {"detectors.simplenet", "export", "export.formats", *(f"data.{name}" for name in layouts)}


def modules_after(program: str) -> set[str]:
    """Run a program in a fresh interpreter; give the packages that are then imported."""
    ending = "\nimport sys, json; print(json.dumps(sorted({n.partition('.')[0] for n in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", program + ending], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_rooms_for_the_line_import_no_torch() -> None:
    program = "\n".join(f"import blemish.{name}" for name in WITHOUT_TORCH)
    program += "\nimport blemish; blemish.load, blemish.evaluate, blemish.Predictor"
    assert not modules_after(program) & TRAINING_ONLY


HEAVY = TRAINING_ONLY | {"numpy", "PIL", "onnxruntime", "cc3d", "jinja2", "tqdm", "platformdirs"}


def test_help_and_the_bare_package_import_nothing_heavy() -> None:
    assert not modules_after("import blemish, blemish.cli") & HEAVY
    for words in (["--help"], ["train", "--help"], ["benchmark", "--help"], ["--version"]):
        program = f"from blemish import cli\ntry: cli.main({words})\nexcept SystemExit: pass"
        assert not modules_after(program) & HEAVY


# --- the public surface ---


def test_every_public_name_is_there() -> None:
    assert blemish.__all__ == sorted(blemish.__all__)
    assert set(blemish.__all__) == {*blemish._ROOMS, "__version__"}
    for name, room in blemish._ROOMS.items():
        assert getattr(blemish, name) is getattr(importlib.import_module(f"blemish.{room}"), name)


def test_type_checkers_see_the_same_names() -> None:
    (block,) = [node for node in parsed(SOURCE / "__init__.py").body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module.removeprefix("blemish.")
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert seen == blemish._ROOMS


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'blemish' has no attribute 'Engine'"):
        blemish.Engine  # noqa: B018


def test_the_command_line_lists_the_methods_that_exist() -> None:
    assert tuple(registry.METHODS) == cli.METHODS


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
    for name, path in modules():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                assert caught not in ("Exception", "BaseException", "everything"), f"{name} catches {caught}"


def test_every_error_is_in_the_tree() -> None:
    from blemish import errors

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
