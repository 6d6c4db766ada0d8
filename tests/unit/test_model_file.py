"""The model file: what is written is read, what is damaged or foreign is refused, old ones keep loading."""

import contextlib
import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from make_format1 import BAD, FILES, GOOD
from safetensors.torch import load

import blemish
import drawn
from blemish import files
from blemish.detectors import onnx_graph
from blemish.detectors.registry import build, configure
from blemish.errors import ModelFileError
from blemish.images.resizing import to_input
from blemish.inference import bundle
from blemish.inference.bundle import FORMAT, GRAPH, MANIFEST, WEIGHTS
from blemish.inference.calibration import fit
from blemish.inference.choice import Choice
from blemish.inference.engines import open_graph
from blemish.training import finalise
from blemish.types import Calibration
from drawn import Tiny

pytestmark = pytest.mark.usefixtures("one_thread")

CALIBRATION = calibrate([[1.0], [2.0], [4.0]], [3.0, 5.0, 6.0], ("maximum",))


def manifest() -> dict[str, Any]:
    """Make the least that a model file must say."""
    return {
        "method": "none",
        "config": {},
        "preprocessing": {"image_size": [4, 4], "white": 65535.0},
        "outputs": ["map", "statistics"],
        "calibration": json.loads(json.dumps(CALIBRATION.__dict__)),
        "training": {"notes": ["ä"]},
        "versions": {},
    }


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Write a model file whose weights and graph are a few bytes."""
    path = tmp_path / "small.blemish"
    bundle.write(path, manifest(), b"the weights", b"the graph")
    return path


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Write a model file's members again after a change to them."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def refused(path: Path) -> str:
    """Check that a file is refused in one sentence that names it, and left as it was."""
    before = drawn.snapshot(path.parent)
    with pytest.raises(ModelFileError) as raised:
        blemish.load(path)
    said = str(raised.value)
    assert str(path) in said
    assert "\n" not in said
    assert drawn.snapshot(path.parent) == before
    return said


# --- round trip ---


def test_what_is_written_is_read(small: Path) -> None:
    found = bundle.read(small)
    assert (found.path, found.weights, found.graph) == (small, b"the weights", b"the graph")
    assert {key: found.manifest[key] for key in manifest()} == manifest()
    assert found.manifest["format"] == FORMAT
    assert found.calibration == CALIBRATION
    assert [path.name for path in small.parent.iterdir()] == ["small.blemish"]


def test_the_archive_is_plain(small: Path) -> None:
    with zipfile.ZipFile(small) as archive:
        assert archive.namelist() == [MANIFEST, WEIGHTS, GRAPH]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.testzip() is None


def test_the_same_model_gives_the_same_bytes(small: Path, tmp_path: Path) -> None:
    bundle.write(tmp_path / "again.blemish", manifest(), b"the weights", b"the graph")
    assert (tmp_path / "again.blemish").read_bytes() == small.read_bytes()


def test_a_graph_is_exported_to_the_same_bytes_and_tells_nothing_of_this_machine(tiny: Tiny) -> None:
    opened = bundle.read(tiny.file)
    detector = build("supersimplenet", configure("supersimplenet", settings=drawn.TINY), 7)
    detector.load_state_dict(load(opened.weights))
    detector.to(memory_format=torch.channels_last)  # as in training
    assert onnx_graph.graph(detector) == opened.graph
    stored = tiny.file.read_bytes()
    for path in (Path(blemish.__file__).parent, tiny.data.parent, Path.home(), Path(sys.prefix)):
        assert str(path).encode() not in stored


def test_a_detector_is_exported_before_it_has_seen_an_image(tiny: Tiny) -> None:
    """What is computed while torch traces must not be kept: it has no values."""
    settings = drawn.TINY | {"image_size": (64, 88)}  # a size that no other test has
    detector = build("supersimplenet", configure("supersimplenet", settings=settings), 0).eval()
    graph = open_graph(onnx_graph.graph(detector), detector.outputs, Choice())
    images = torch.from_numpy(to_input(drawn.part(1, (64, 88))))[None]
    assert finalise.compare(detector, graph, [images]) <= finalise.TOLERANCE


def test_a_calibration_can_be_replaced(small: Path, tmp_path: Path) -> None:
    opened, target = bundle.read(small), tmp_path / "other" / "new.blemish"
    changed = replace(CALIBRATION, defect_threshold=9.0)
    bundle.recalibrate(opened, changed, target, ["00ff"])
    found = bundle.read(target)
    assert found.calibration == changed
    assert (found.weights, found.graph) == (opened.weights, opened.graph)
    assert {key: value for key, value in found.manifest.items() if key != "calibration"} == {
        key: value for key, value in opened.manifest.items() if key != "calibration"
    }


def test_a_calibration_remembers_its_images_and_those_before(small: Path, tmp_path: Path) -> None:
    opened = bundle.read(small)
    files = {"train": ["aa"], "held_out": ["bb"], "before": ["cc"]}
    known = replace(opened, manifest=opened.manifest | {"training": {"files": files}})
    bundle.recalibrate(known, CALIBRATION, tmp_path / "new.blemish", ["dd"])
    found = bundle.read(tmp_path / "new.blemish").manifest["training"]["files"]
    assert found == {"train": ["aa"], "held_out": ["dd"], "before": ["bb", "cc"]}


def test_numbers_survive_to_the_last_bit(small: Path) -> None:
    exact = replace(CALIBRATION, scores=(0.1, 1 / 3, 1e-300, 2.0**60 + 1), defect_threshold=0.1 + 0.2)
    bundle.recalibrate(bundle.read(small), exact, small, [])
    assert bundle.read(small).calibration == exact


def test_numbers_that_json_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        bundle.write(tmp_path / "nan.blemish", manifest() | {"training": {"loss": float("nan")}}, b"", b"")
    assert list(tmp_path.iterdir()) == []


# --- released formats ---


def test_format_1_keeps_loading_and_scoring_the_same() -> None:
    model = blemish.load(FILES / "format1.blemish")
    assert model.manifest["format"] == 1
    parts = [drawn.part(number) for number in GOOD] + [drawn.spotted(number)[0] for number in BAD]
    for part, expected in zip(parts, json.loads((FILES / "format1.json").read_text()), strict=True):
        verdict = model.predict(part)
        # Another processor may round otherwise.
        assert verdict.score == pytest.approx(expected["score"], rel=1e-4, abs=1e-3)
        assert float(verdict.map.max()) == pytest.approx(expected["peak"], rel=1e-4, abs=1e-5)
        assert (verdict.label, verdict.p_value) == (expected["label"], expected["p_value"])


def test_there_is_a_file_of_every_format() -> None:
    assert all((FILES / f"format{number}.blemish").is_file() for number in range(1, FORMAT + 1))


# --- damage ---


def test_a_missing_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.blemish").startswith("no model file ")


def test_a_folder_is_no_model_file(tmp_path: Path) -> None:
    (tmp_path / "m.blemish").mkdir()
    assert refused(tmp_path / "m.blemish").startswith("no model file ")


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x05\x06" + bytes(18), b"PK\x03\x04", bytes(1000)])
def test_files_of_something_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.blemish"
    path.write_bytes(content)
    assert "is no model file" in refused(path)


def test_every_truncation_is_refused(small: Path) -> None:
    whole = small.read_bytes()
    for length in range(0, len(whole), 7):
        small.write_bytes(whole[:length])
        with pytest.raises(ModelFileError):
            bundle.read(small)


def test_no_wrong_byte_goes_unnoticed(small: Path) -> None:
    """A byte that is changed anywhere is refused, or is one of the zip's that do not matter."""
    whole, expected = small.read_bytes(), bundle.read(small)
    rng = random.Random(0)
    for place in range(len(whole)):
        for value in {whole[place] ^ 1, whole[place] ^ 128, rng.randrange(256)} - {whole[place]}:
            small.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            with contextlib.suppress(ModelFileError):
                assert bundle.read(small) == expected


@pytest.mark.parametrize("name", [WEIGHTS, GRAPH])
def test_a_member_with_another_hash(small: Path, name: str) -> None:
    rewrite(small, lambda members: members.update({name: members[name] + b"."}))
    assert f"{name} has SHA-256 " in refused(small)


@pytest.mark.parametrize("name", [WEIGHTS, GRAPH])
def test_a_missing_member(small: Path, name: str) -> None:
    rewrite(small, lambda members: [members.pop(name)])
    assert f"is damaged: it lacks {name}" in refused(small)


def test_a_missing_manifest(small: Path) -> None:
    rewrite(small, lambda members: [members.pop(MANIFEST)])
    assert f"it has no {MANIFEST}" in refused(small)


@pytest.mark.parametrize("name", ["../evil.txt", "/etc/evil.txt", "a/../../evil", "run.pkl", "weights/"])
def test_a_member_that_no_model_file_has(small: Path, name: str) -> None:
    rewrite(small, lambda members: members.update({name: b"evil"}))
    assert f"has a member {name!r} that no model file has" in refused(small)


def say(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, bytes]], None]:
    """Make a change of what the manifest says."""

    def apply(members: dict[str, bytes]) -> None:
        said = json.loads(members[MANIFEST])
        change(said)
        members[MANIFEST] = json.dumps(said).encode()

    return apply


@pytest.mark.parametrize("number", [0, 2, 99, "1", None, [1]])
def test_a_foreign_format_number(small: Path, number: Any) -> None:
    rewrite(small, say(lambda said: said.update(format=number)))
    assert refused(small).endswith(f"has format {number}; this version of Blemish reads format {FORMAT}")


def test_a_foreign_format_is_told_before_anything_else(small: Path) -> None:
    rewrite(small, lambda members: members.update({MANIFEST: b'{"format": 2}'}))
    assert "has format 2; this version of Blemish reads format 1" in refused(small)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'"format"', b"{}", b"\xff\xfe"])
def test_a_manifest_without_a_format(small: Path, content: bytes) -> None:
    rewrite(small, lambda members: members.update({MANIFEST: content}))
    assert f"its {MANIFEST} has no format number" in refused(small)


@pytest.mark.parametrize("key", bundle.REQUIRED)
def test_a_manifest_that_lacks_something(small: Path, key: str) -> None:
    whole = small.read_bytes()
    rewrite(small, say(lambda said: said.pop(key)))
    assert f"its {MANIFEST} lacks {key!r}" in refused(small)
    for part in bundle.REQUIRED[key]:
        small.write_bytes(whole)
        rewrite(small, say(lambda said, part=part: said[key].pop(part)))
        assert f"{key!r} in its {MANIFEST} lacks {part!r}" in refused(small)
        rewrite(small, say(lambda said: said.update({key: 3})))
        refused(small)


@pytest.mark.parametrize("outputs", [["map"], ["statistics", "map"], ["map", "statistics", "logical"], []])
def test_a_graph_with_other_outputs(tiny: Tiny, tmp_path: Path, outputs: list[str]) -> None:
    opened, path = bundle.read(tiny.file), tmp_path / "m.blemish"
    said = {key: value for key, value in opened.manifest.items() if key not in ("format", "members")}
    bundle.write(path, said | {"outputs": outputs}, opened.weights, opened.graph)
    with pytest.raises(ModelFileError, match="the graph gives map, statistics; expected"):
        blemish.load(path)


@pytest.mark.parametrize("graph", [b"", b"no graph", bytes(100)])
def test_a_graph_that_is_none(tmp_path: Path, graph: bytes) -> None:
    path = tmp_path / "m.blemish"
    bundle.write(path, manifest(), b"", graph)
    with pytest.raises(ModelFileError, match="ONNX Runtime cannot run the graph") as raised:
        blemish.load(path)
    assert "\n" not in str(raised.value)


# --- files that are whole or not there ---


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "f.txt"
    files.write_whole(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the n")
        assert temporary.parent == path.parent
        raise InterruptedError

    with pytest.raises(InterruptedError), files.whole_file(path) as temporary:
        fail(temporary)
    assert drawn.snapshot(tmp_path) == {"f.txt": b"old"}
    files.write_whole(path, b"new")
    assert drawn.snapshot(tmp_path) == {"f.txt": b"new"}
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_process_that_dies_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.blemish"
    path.write_bytes(b"old")
    script = (
        "import os, sys; from pathlib import Path; from blemish.files import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, path], check=False).returncode == 9
    assert path.read_bytes() == b"old"
    rest = [other for other in tmp_path.iterdir() if other != path]
    assert [other.name.startswith(".m.blemish.") for other in rest] == [True]  # hidden from every listing


def test_missing_folders_are_made(tmp_path: Path) -> None:
    files.write_whole(tmp_path / "a/b/c.txt", "ä")
    assert (tmp_path / "a/b/c.txt").read_text(encoding="utf-8") == "ä"


def test_calibrations_are_read_as_they_were(small: Path) -> None:
    found = bundle.read(small).calibration
    assert isinstance(found, Calibration)
    assert all(isinstance(getattr(found, name), tuple) for name in ("scores", "centers", "pixel_maxima"))
