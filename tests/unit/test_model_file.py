"""The model file: what is written can be read, damaged files are refused, files of old formats still load."""

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_format1 import BAD, FILES, GOOD
from safetensors.torch import load

import blemish
import drawn
from blemish import files, images
from blemish.data.folds import FoldRecord
from blemish.detectors import onnx_graph
from blemish.detectors.registry import build, configure
from blemish.errors import ModelFileError
from blemish.images import Light, Preprocessing
from blemish.images.resizing import to_input
from blemish.inference import bundle
from blemish.inference.bundle import FORMATS, GRAPH, MANIFEST, WEIGHTS, Bundle
from blemish.inference.calibration import fit
from blemish.inference.choice import Choice
from blemish.inference.engines import open_graph
from blemish.inference.manifest import ExportRecord, Manifest, UsedFiles, recalibrated
from blemish.inference.predictor import Predictor
from blemish.training import finalise
from blemish.types import LightCalibration
from drawn import Tiny

pytestmark = pytest.mark.usefixtures("one_thread")

CALIBRATION = fit(np.array([[1.0], [2.0], [4.0]]), np.array([3.0, 5.0, 6.0]), ("maximum",))
LEAST = Manifest.untrained("none", {}, Preprocessing((4, 4), 65535.0), ("map", "statistics"))
LEAST = replace(LEAST, calibration=CALIBRATION, training=replace(LEAST.training, notes=("ä",)))
"""What a model file must say, and no more."""
LIGHT = Light((0.5,) * 3, (0.1,) * 3, (0.01,) * 6, tuple(map(tuple, np.diag([0.1, 0.2] * 3).tolist())))
FULL = replace(
    LEAST,
    config={"image_size": [4, 4], "noise": 0.5, "upscale": True},
    preprocessing=replace(LEAST.preprocessing, light=LIGHT),
    light_calibration=LightCalibration((0.5, 1.5, 2.5), 0.25),
    training=replace(
        LEAST.training,
        history=({"step": 2.0, "loss": 0.1},),
        fold=FoldRecord(1, 3, 7, "aa", {"path": "folds.csv", "sha256": "bb"}),
        files=UsedFiles(("cc",), ("dd",), ("ee",)),
    ),
    versions={"blemish": "0.1.0"},
    engine=Choice("openvino", "bf16"),
    export=ExportRecord(
        limits={"map_error": 0.1},
        agreement={"held_out": {"images": 2, "labels": 1.0}},
        flops=7,
        reduced=({"layer": "second", "kept": 32},),
        in_floating_point=("head",),
        thresholds="set again",
    ),
)
"""All that a model file can say."""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Write a model file whose weights and graph are a few bytes."""
    path = tmp_path / "small.blemish"
    bundle.write(path, LEAST, b"the weights", b"the graph")
    return path


def rewrite(path: Path, change: Callable[[dict[str, bytes]], Any]) -> None:
    """Change the members of a model file."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def refused(path: Path) -> str:
    """Return the sentence by which a file is refused: it names the file, which stays as it was."""
    before = drawn.snapshot(path.parent)
    with pytest.raises(ModelFileError) as raised:
        blemish.load(path)
    said = str(raised.value)
    assert str(path) in said
    assert "\n" not in said
    assert drawn.snapshot(path.parent) == before
    return said


# --- round trip ---


@pytest.mark.parametrize("written", [LEAST, FULL], ids=["least", "full"])
def test_what_is_written_is_read(tmp_path: Path, written: Manifest) -> None:
    path = tmp_path / "m.blemish"
    bundle.write(path, written, b"the weights", b"the graph")
    assert bundle.read(path) == Bundle(path, written, b"the weights", b"the graph")
    assert [found.name for found in tmp_path.iterdir()] == ["m.blemish"]


def test_the_manifest_is_written_under_the_names_of_the_documentation(small: Path) -> None:
    said = manifest_of(small)
    assert list(said) == [
        *("format", "method", "config", "preprocessing", "outputs", "calibration", "training", "versions"),
        "members",
    ]
    assert said["format"] == 1
    assert list(said["preprocessing"]) == ["image_size", "white", "color"]
    assert said["members"] == {
        WEIGHTS: hashlib.sha256(b"the weights").hexdigest(),
        GRAPH: hashlib.sha256(b"the graph").hexdigest(),
    }
    bundle.write(small, FULL, b"the weights", b"the graph")
    assert list(manifest_of(small)) == [
        *("format", "requires", "method", "config", "preprocessing", "outputs", "calibration", "training"),
        *("versions", "engine", "export", "light_calibration", "members"),
    ]
    record = as_json(FULL)
    assert record["training"]["run"]["from"] == ""
    assert record["export"]["in floating point"] == ["head"]
    assert record["engine"] == {
        "backend": "openvino", "precision": "bf16", "device": "cpu", "compiled": False,
    }  # fmt: skip


def test_a_manifest_of_a_later_version_may_say_more(small: Path) -> None:
    rewrite(small, say(lambda said: said.update(more=1)))
    rewrite(small, say(lambda said: said["training"]["run"].update(more=1)))
    assert bundle.read(small).manifest == LEAST


def test_the_archive_is_plain(small: Path) -> None:
    with zipfile.ZipFile(small) as archive:
        assert archive.namelist() == [MANIFEST, WEIGHTS, GRAPH]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.testzip() is None


def test_the_same_model_gives_the_same_bytes(small: Path, tmp_path: Path) -> None:
    bundle.write(tmp_path / "again.blemish", LEAST, b"the weights", b"the graph")
    assert (tmp_path / "again.blemish").read_bytes() == small.read_bytes()


def test_a_graph_is_exported_to_the_same_bytes_and_tells_nothing_of_this_machine(tiny: Tiny) -> None:
    opened = bundle.read(tiny.file)
    detector = build("supersimplenet", configure("supersimplenet", settings=drawn.TINY), 7)
    detector.load_state_dict(load(opened.weights))
    detector.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as in training
    assert onnx_graph.export_detector(detector) == opened.graph
    stored = tiny.file.read_bytes()
    for path in (Path(blemish.__file__).parent, tiny.data.parent, Path.home(), Path(sys.prefix)):
        assert str(path).encode() not in stored


def test_a_detector_is_exported_before_it_has_seen_an_image(tiny: Tiny) -> None:
    """What is computed while torch traces must not be kept: it has no values."""
    settings = drawn.TINY | {"image_size": (64, 88)}  # a size that no other test has
    detector = build("supersimplenet", configure("supersimplenet", settings=settings), 0).eval()
    graph = open_graph(onnx_graph.export_detector(detector), detector.outputs, Choice())
    batch = torch.from_numpy(to_input(drawn.part(1, (64, 88))))[None]
    assert finalise.compare(detector, graph, [batch]) <= finalise.TOLERANCE


def test_another_calibration_changes_nothing_else() -> None:
    changed = replace(CALIBRATION, defect_threshold=9.0)
    assert recalibrated(LEAST, changed, ("00ff",)) == replace(LEAST, calibration=changed)


def test_a_calibration_remembers_its_images_and_those_before() -> None:
    known = replace(LEAST, training=replace(LEAST.training, files=UsedFiles(("aa",), ("bb",), ("cc",))))
    found = recalibrated(known, CALIBRATION, ("dd",))
    assert found.training.files == UsedFiles(("aa",), ("dd",), ("bb", "cc"))
    assert found.used == {"aa", "bb", "cc", "dd"}
    assert LEAST.used == set()


def test_calibrating_a_file_changes_its_thresholds_and_nothing_else(tmp_path: Path) -> None:
    source, out = FILES / "format1.blemish", tmp_path / "other" / "new.blemish"
    for number in range(7000, 7006):
        images.write_png(tmp_path / f"good/{number}.png", drawn.part(number))
    calibration = blemish.calibrate(source, tmp_path / "good", out=out, false_reject_rate=0.2)
    before = bundle.read(source)
    assert calibration != before.manifest.calibration
    expected = replace(before.manifest, calibration=calibration)
    assert bundle.read(out) == Bundle(out, expected, before.weights, before.graph)


def test_numbers_survive_to_the_last_bit(small: Path) -> None:
    exact = replace(CALIBRATION, scores=(1e-300, 0.1, 1 / 3, 2.0**60 + 1), defect_threshold=0.1 + 0.2)
    bundle.write(small, replace(LEAST, calibration=exact), b"", b"")
    assert bundle.read(small).manifest.calibration == exact


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("calibration.centers", [0.0] * 7, "calibration.centers in its manifest has 7 numbers; expected 3"),
        ("calibration.scales", [1.0, 0.0, 1.0], "calibration.scales in its manifest has 0.0; expected more"),
        ("calibration.scores", [1.0, 0.5], "calibration.scores in its manifest is empty or not ascending"),
        ("calibration.pixel_maxima", [], "calibration.pixel_maxima in its manifest is empty"),
        ("preprocessing.image_size", [64, 32], "preprocessing.image_size in its manifest is"),
        ("preprocessing.white", 0.0, "preprocessing.white in its manifest is 0.0; expected more than 0"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(
    place: str, value: Any, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.blemish"
    path.write_bytes((FILES / "format1.blemish").read_bytes())
    group, name = place.split(".")
    rewrite(path, say(lambda said: said[group].update({name: value})))
    assert says in refused(path)


def test_a_number_too_large_for_a_float_is_refused(small: Path) -> None:
    rewrite(small, say(lambda said: said["calibration"].update(defect_threshold="THERE")))
    with zipfile.ZipFile(small) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["manifest.json"] = members["manifest.json"].replace(b'"THERE"', b"1e999")
    with zipfile.ZipFile(small, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert "found 1e999 in its manifest.json; expected finite numbers" in refused(small)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_neither_written_nor_read(small: Path, number: float) -> None:
    broken = replace(LEAST, calibration=replace(CALIBRATION, defect_threshold=number))
    with pytest.raises(ValueError, match="not JSON compliant"):
        bundle.write(small.with_name("nan.blemish"), broken, b"", b"")
    assert [path.name for path in small.parent.iterdir()] == ["small.blemish"]
    rewrite(small, say(lambda said: said["calibration"].update(defect_threshold=number)))
    assert "in its manifest.json; expected finite numbers" in refused(small)


# --- released formats ---


def test_format_1_keeps_loading_and_scoring_the_same() -> None:
    model = blemish.load(FILES / "format1.blemish")
    assert manifest_of(FILES / "format1.blemish")["format"] == 1
    parts = [drawn.part(number) for number in GOOD] + [drawn.spotted(number)[0] for number in BAD]
    for part, expected in zip(parts, json.loads((FILES / "format1.json").read_text()), strict=True):
        verdict = model.predict(part)
        # Another processor may round otherwise.
        assert verdict.score == pytest.approx(expected["score"], rel=1e-4, abs=1e-3)
        assert float(verdict.map.max()) == pytest.approx(expected["peak"], rel=1e-4, abs=1e-5)
        assert (verdict.label, verdict.p_value) == (expected["label"], expected["p_value"])


def test_format_2_keeps_loading_and_scoring_the_same() -> None:
    """Its light is part of how it judges, so a reader that ignored it would reach other scores."""
    opened = bundle.read(FILES / "format2.blemish")
    said = manifest_of(FILES / "format2.blemish")
    assert (said["format"], said["requires"]) == (2, ["light"])
    model, ignorant = (
        Predictor(replace(opened, manifest=manifest))
        for manifest in (
            opened.manifest,
            replace(opened.manifest, preprocessing=replace(opened.manifest.preprocessing, light=None)),
        )
    )
    parts = [drawn.part(number) for number in GOOD] + [drawn.spotted(number)[0] for number in BAD]
    differs = False
    for part, expected in zip(parts, json.loads((FILES / "format2.json").read_text()), strict=True):
        verdict = model.predict(part)
        assert verdict.score == pytest.approx(expected["score"], rel=1e-4, abs=1e-3)
        assert float(verdict.map.max()) == pytest.approx(expected["peak"], rel=1e-4, abs=1e-5)
        assert (verdict.label, verdict.p_value) == (expected["label"], expected["p_value"])
        assert verdict.light_p == expected["light_p"]
        differs |= ignorant.predict(part).score != pytest.approx(expected["score"], rel=1e-3, abs=1e-2)
    assert differs


def test_only_what_an_earlier_reader_would_misjudge_gets_format_2(tiny: Tiny, small: Path) -> None:
    """What reads format 1 alone looks at the number first, and refuses the file by it."""
    assert [manifest_of(path)["format"] for path in (tiny.file, small)] == [1, 1]
    assert "requires" not in manifest_of(tiny.file)
    bundle.write(small, replace(FULL, engine=Choice(), export=None), b"", b"")
    assert manifest_of(small)["format"] == 2
    dark = replace(FULL, preprocessing=LEAST.preprocessing, light_calibration=None)
    bundle.write(small, dark, b"", b"")
    assert manifest_of(small)["format"] == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda said: said.update(requires=["light", "tiles"]), "requires 'tiles', which this version of"),
        (lambda said: said.update(requires=[["light"]]), "requires ['light'], which this version of"),
        (lambda said: said.update(requires="light"), "'requires' in its manifest.json is no list"),
        (lambda said: said.update(requires=[]), "what it requires and what it contains differ"),
        (lambda said: said.pop("requires"), "what it requires and what it contains differ"),
        (lambda said: said.pop("light_calibration"), "one of light and light_calibration; expected both"),
        (lambda said: said["preprocessing"].pop("light"), "one of light and light_calibration"),
        (lambda said: said["light_calibration"].update(scores=[2, 1]), "no ascending scores, or a limit"),
        (lambda said: said["light_calibration"].update(limit=1), "no ascending scores, or a limit"),
        (lambda said: said["preprocessing"]["light"].update(mean=[0.5]), "preprocessing.light has levels of"),
    ],
)
def test_light_that_does_not_fit_is_refused(small: Path, change: Callable[[Any], Any], says: str) -> None:
    bundle.write(small, FULL, b"", b"")
    rewrite(small, say(change))
    assert says in refused(small)


def test_format_1_is_read_completely() -> None:
    """What the first files lack gets the value that it had then; the rest is as the file says."""
    said = manifest_of(FILES / "format1.blemish")
    manifest = bundle.read(FILES / "format1.blemish").manifest
    again = as_json(manifest)
    assert {name: again[name] for name in again if name != "training"} == {
        name: said[name] for name in said if name not in ("format", "members", "training")
    }
    training, run = again["training"], again["training"]["run"]
    assert {name: training[name] for name in said["training"] if name != "run"} == {
        name: value for name, value in said["training"].items() if name != "run"
    }
    assert {name: run[name] for name in said["training"]["run"]} == said["training"]["run"]
    assert (run["supervision"], run["from"]) == ("none", "")
    assert (manifest.training.fold, manifest.training.files, manifest.export) == (None, None, None)
    assert manifest.used == set()


def test_there_is_a_file_of_every_format() -> None:
    found = {path.name: manifest_of(path)["format"] for path in FILES.glob("*.blemish")}
    assert found == {f"format{number}.blemish": number for number in FORMATS}


# --- damage ---


def test_a_missing_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.blemish").startswith("found no model file at ")


def test_a_folder_is_no_model_file(tmp_path: Path) -> None:
    (tmp_path / "m.blemish").mkdir()
    assert refused(tmp_path / "m.blemish").startswith("found no model file at ")


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x05\x06" + bytes(18), b"PK\x03\x04", bytes(1000)])
def test_files_of_something_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.blemish"
    path.write_bytes(content)
    assert "is not a model file" in refused(path)


def test_every_truncation_is_refused(small: Path) -> None:
    for length in range(small.stat().st_size - 1, -1, -7):
        os.truncate(small, length)
        with pytest.raises(ModelFileError):
            bundle.read(small)


def test_no_wrong_byte_goes_unnoticed(small: Path) -> None:
    """A byte that is changed anywhere is refused, or is one of the zip's that do not matter."""
    whole, expected = small.read_bytes(), bundle.read(small)
    rng = random.Random(0)
    with small.open("r+b", buffering=0) as file:  # in place: to write a file anew takes much longer
        for place in range(len(whole)):
            for value in {whole[place] ^ 1, whole[place] ^ 128, rng.randrange(256)} - {whole[place]}:
                file.seek(place)
                file.write(bytes([value]))
                with contextlib.suppress(ModelFileError):
                    assert bundle.read(small) == expected
            file.seek(place)
            file.write(whole[place : place + 1])
    assert small.read_bytes() == whole


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


def as_json(manifest: Manifest) -> dict[str, Any]:
    """Return a manifest as it comes back from JSON."""
    said: dict[str, Any] = json.loads(json.dumps(manifest.to_json()))
    return said


def manifest_of(path: Path) -> dict[str, Any]:
    """Return the manifest of a model file as JSON has it."""
    with zipfile.ZipFile(path) as archive:
        said: dict[str, Any] = json.loads(archive.read(MANIFEST))
    return said


def say(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, bytes]], None]:
    """Return a change of members that changes the manifest."""

    def apply(members: dict[str, bytes]) -> None:
        said = json.loads(members[MANIFEST])
        change(said)
        members[MANIFEST] = json.dumps(said).encode()

    return apply


@pytest.mark.parametrize("number", [0, 3, 99, "1", None, [1]])
def test_a_foreign_format_number(small: Path, number: Any) -> None:
    rewrite(small, say(lambda said: said.update(format=number)))
    assert refused(small).endswith(f"has format {number}; this version of Blemish reads formats 1 and 2")


def test_a_foreign_format_is_refused_before_anything_else(small: Path) -> None:
    rewrite(small, lambda members: members.update({MANIFEST: b'{"format": 3}'}))
    assert "has format 3; this version of Blemish reads formats 1 and 2" in refused(small)
    rewrite(small, lambda members: members.update({MANIFEST: b'{"format": 2, "requires": ["tiles"]}'}))
    assert "requires 'tiles', which this version of Blemish does not know" in refused(small)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'"format"', b"{}", b"\xff\xfe"])
def test_a_manifest_without_a_format(small: Path, content: bytes) -> None:
    rewrite(small, lambda members: members.update({MANIFEST: content}))
    assert f"its {MANIFEST} has no format number" in refused(small)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda said: said.pop("members"), WEIGHTS),
        (lambda said: said.update(members=[WEIGHTS, GRAPH]), WEIGHTS),
        (lambda said: said["members"].pop(WEIGHTS), WEIGHTS),
        (lambda said: said["members"].pop(GRAPH), GRAPH),
        (lambda said: said["members"].update({GRAPH: 3}), GRAPH),
    ],
)
def test_a_member_without_a_digest(small: Path, change: Callable[[Any], Any], name: str) -> None:
    rewrite(small, say(change))
    assert f"'members' in its {MANIFEST} lacks {name!r}" in refused(small)


OPEN = {
    *("config", "versions", "training.run.config", "training.fold.file"),
    *("export.limits", "export.agreement"),
}
"""Objects whose names are not fixed."""
LATER = {
    *("engine", *(f"engine.{name}" for name in ("backend", "precision", "device", "compiled")), "export"),
    *("preprocessing.color", "training.fold", "training.files", "training.files.before"),
    *("training.files.names", "calibration.left_out"),
    *("training.defective_images", "training.masked_images"),
    *(f"training.run.{name}" for name in ("supervision", "natural_images", "from", "white", "device")),
    *("training.run.torch", "training.run.blemish", "training.run.light"),
    *("preprocessing.light", "preprocessing.light.gain_limits", "preprocessing.light.offset_limit"),
    *("light_calibration", "light_calibration.limit"),
}
"""Fields that the first files of format 1 lack, or that only some files have."""


def fields(value: Any, path: str = "") -> Iterator[str]:
    """Yield the path of every field of a manifest, at every level, such as training.run.seed."""
    if isinstance(value, dict) and path not in OPEN:
        for name, inner in value.items():
            place = f"{path}.{name}" if path else name
            yield place
            yield from fields(inner, place)


def parent(record: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """Return the object that holds a field, and the field's own name in it."""
    *names, last = path.split(".")
    for name in names:
        record = record[name]
    return record, last


FIELDS = tuple(fields(as_json(FULL)))


def test_fields_of_every_level_are_tried() -> None:
    assert {"method", "calibration.scores", "training.run.seed", "training.fold.count", "engine.device"} < {
        *FIELDS
    }
    assert set(FIELDS) > LATER
    assert len(FIELDS) > 70


@pytest.mark.parametrize("path", sorted({*FIELDS} - LATER))
def test_a_manifest_that_lacks_a_field_is_refused_by_its_name(path: str) -> None:
    record = as_json(FULL)
    holder, name = parent(record, path)
    del holder[name]
    with pytest.raises(ModelFileError) as raised:
        Manifest.from_json(record, "m.blemish")
    assert str(raised.value) == f"m.blemish is damaged: found no field {path} in its manifest; expected one"


@pytest.mark.parametrize("path", sorted(LATER))
def test_a_manifest_may_lack_a_later_field(path: str) -> None:
    record = as_json(FULL)
    holder, name = parent(record, path)
    del holder[name]
    if path == "engine.backend":  # which bf16 does not go with
        holder["precision"] = "fp32"
    if path == "preprocessing.light":  # which goes with its calibration
        del record["light_calibration"]
    if path == "light_calibration":
        del record["preprocessing"]["light"]
    assert Manifest.from_json(record, "m.blemish").method == FULL.method


VALUES: dict[type, Any] = {
    str: "text",
    int: 7,
    float: 1.5,
    bool: True,
    list: [],
    dict: {},
    type(None): None,
}
"""A value of every type that JSON has."""
ALSO: dict[str, type] = {"training.run.natural_images": int}
ALSO |= dict.fromkeys(("export", "training.fold", "training.files", "training.fold.file"), type(None))
ALSO |= dict.fromkeys(("preprocessing.light", "light_calibration"), type(None))
"""The second type of fields that have two."""


@pytest.mark.parametrize("path", FIELDS)
def test_a_manifest_with_a_field_of_another_type_is_refused_by_its_name(path: str) -> None:
    holder, name = parent(as_json(FULL), path)
    good = {type(holder[name]), ALSO.get(path)} | ({int} if isinstance(holder[name], float) else set())
    for value in (value for kind, value in VALUES.items() if kind not in good):
        record = as_json(FULL)
        holder, name = parent(record, path)
        holder[name] = value
        with pytest.raises(ModelFileError) as raised:
            Manifest.from_json(record, "m.blemish")
        assert str(raised.value).startswith(
            f"m.blemish is damaged: {path} in its manifest does not fit: expected "
        )


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("method", 3, "method in its manifest does not fit: expected `str`, got `int`"),
        ("outputs", "map", "outputs in its manifest does not fit: expected `array`, got `str`"),
        ("preprocessing", [], "preprocessing in its manifest does not fit: expected `object`, got `array`"),
        ("preprocessing.image_size", [4], "preprocessing.image_size in its manifest does not fit: expected"),
        ("preprocessing.image_size", [4, "4"], "preprocessing.image_size[1] in its manifest does not fit"),
        (
            "preprocessing.color",
            "BGR",
            "preprocessing.color in its manifest does not fit: invalid enum value",
        ),
        ("calibration.scores", [0.5, "x"], "calibration.scores[1] in its manifest does not fit"),
        (
            "training.run.seed",
            "0",
            "training.run.seed in its manifest does not fit: expected `int`, got `str`",
        ),
        ("training.run.from", 1, "training.run.from in its manifest does not fit: expected `str`, got `int`"),
        ("training.files.train", [1], "training.files.train[0] in its manifest does not fit"),
        ("training.fold.count", 2.5, "training.fold.count in its manifest does not fit"),
        ("training.history", [{"step": "one"}], "training.history[0][...] in its manifest does not fit"),
        ("export.limits", {"map_error": "none"}, "export.limits[...] in its manifest does not fit"),
        ("export.in floating point", 1, "export.in floating point in its manifest does not fit"),
    ],
)
def test_a_file_with_a_damaged_field_is_refused_by_its_name(
    tmp_path: Path, path: str, value: Any, said: str
) -> None:
    file = tmp_path / "m.blemish"
    bundle.write(file, FULL, b"", b"")

    def change(record: dict[str, Any]) -> None:
        holder, name = parent(record, path)
        holder[name] = value

    rewrite(file, say(change))
    assert said in refused(file)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"backend": "tflite"}, "unknown backend 'tflite'; expected onnxruntime, openvino, torch"),
        ({"backend": "openvino", "device": "cuda"}, "device cuda with openvino: expected cpu"),
    ],
)
def test_an_engine_that_is_not_known_is_refused(small: Path, told: dict[str, str], said: str) -> None:
    rewrite(small, say(lambda record: record.update(engine=told)))
    assert refused(small) == f"{small} needs an engine that this version does not know: {said}"


@pytest.mark.parametrize("outputs", [["map"], ["statistics", "map"], ["map", "statistics", "logical"], []])
def test_a_graph_with_other_outputs(tiny: Tiny, tmp_path: Path, outputs: list[str]) -> None:
    opened, path = bundle.read(tiny.file), tmp_path / "m.blemish"
    bundle.write(path, replace(opened.manifest, outputs=tuple(outputs)), opened.weights, opened.graph)
    with pytest.raises(ModelFileError, match="the graph has the outputs map, statistics; expected"):
        blemish.load(path)


@pytest.mark.parametrize("graph", [b"", b"no graph", bytes(100)])
def test_a_graph_that_is_none(tmp_path: Path, graph: bytes) -> None:
    path = tmp_path / "m.blemish"
    bundle.write(path, LEAST, b"", graph)
    with pytest.raises(ModelFileError, match="ONNX Runtime cannot run the graph") as raised:
        blemish.load(path)
    assert "\n" not in str(raised.value)


# --- files that are whole or not there ---


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "f.txt"
    files.write_atomically(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the n")
        assert temporary.parent == path.parent
        raise InterruptedError

    with pytest.raises(InterruptedError), files.atomic_file(path) as temporary:
        fail(temporary)
    assert drawn.snapshot(tmp_path) == {"f.txt": b"old"}
    files.write_atomically(path, b"new")
    assert drawn.snapshot(tmp_path) == {"f.txt": b"new"}
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_process_that_dies_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.blemish"
    path.write_bytes(b"old")
    script = (
        "import os, sys; from pathlib import Path; from blemish.files import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, path], check=False).returncode == 9
    assert path.read_bytes() == b"old"
    rest = [other for other in tmp_path.iterdir() if other != path]
    assert [other.name.startswith(".m.blemish.") for other in rest] == [True]  # hidden from every listing


def test_missing_folders_are_made(tmp_path: Path) -> None:
    files.write_atomically(tmp_path / "a/b/c.txt", "ä")
    assert (tmp_path / "a/b/c.txt").read_text(encoding="utf-8") == "ä"
