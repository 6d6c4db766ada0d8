"""The examples reach the verdicts of Blemish: from the base install, without Blemish, and in C++."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from make_format1 import FILES
from PIL import Image

import blemish
import drawn
from base_install import run_base_only
from blemish import images
from blemish.types import Verdict

MODEL = FILES / "format1.blemish"
EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = "import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
NOTHING_OF_OURS = "Absent.names |= {'blemish', 'cc3d', 'jinja2', 'tqdm', 'platformdirs', 'msgspec'}\n"


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Write a good part and a defective one, neither of the network's size, the second lying on its side."""
    folder = tmp_path / "parts"
    images.write_png(folder / "good.png", drawn.part(1, (100, 150)))
    turned = Image.Exif()
    turned[274] = 6
    Image.fromarray(drawn.spotted(2, (90, 130))[0]).save(folder / "turned.jpg", exif=turned)
    return folder


def rows(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.splitlines()]


def darken(folder: Path) -> None:
    """Halve the light of the parts in a folder."""
    for path in images.list_images(folder):
        with Image.open(path) as part:
            part.point([value // 2 for value in range(256)] * 3).save(path, exif=part.getexif())


def expected(folder: Path, file: Path = MODEL) -> list[Verdict]:
    with blemish.load(file) as model:
        found = [model.predict(path) for path in images.list_images(folder)]
    assert [verdict.label for verdict in found] == ["ok", "defect"]
    return found


def test_watching_a_folder_needs_the_base_install_only(parts: Path) -> None:
    (parts / "torn.png").write_bytes((parts / "good.png").read_bytes()[:200])
    done = run_base_only(RUN, EXAMPLES / "watch_folder.py", MODEL, parts, "--once")
    assert done.returncode == 0, done.stderr
    good, torn, turned = rows(done.stdout)
    assert torn[0] == "unreadable"
    assert "torn.png" in torn[1]
    (parts / "torn.png").unlink()
    for row, verdict in zip((good, turned), expected(parts), strict=True):
        boxes = str([region.box for region in verdict.regions])
        assert row == [verdict.label, f"{verdict.score:.6g}", verdict.path, boxes]


@pytest.fixture(params=["released", "new", "light"])
def file(request: pytest.FixtureRequest, tiny: drawn.Tiny) -> Path:
    """Return a model file: the first that was released, one that this version wrote, or one of format 2."""
    return {"released": MODEL, "new": tiny.file, "light": FILES / "format2.blemish"}[request.param]


def test_a_model_file_runs_without_blemish(parts: Path, file: Path) -> None:
    if file.name == "format2.blemish":
        darken(parts)
    program = NOTHING_OF_OURS + RUN
    done = run_base_only(program, EXAMPLES / "plain_onnxruntime.py", file, *images.list_images(parts))
    assert done.returncode == 0, done.stderr
    threshold = blemish.load(file).calibration.pixel_threshold
    for row, verdict in zip(rows(done.stdout), expected(parts, file), strict=True):
        assert row[0] == verdict.label
        # Light is summed up in another order, whose rounding the z-scores magnify.
        assert float(row[1]) == pytest.approx(verdict.score, rel=1e-5, abs=1e-3 if verdict.light_p else 0)
        assert row[2] == verdict.path
        assert row[3].split()[0] == str((verdict.map > threshold).sum())


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Build the C++ example; return the program."""
    if not shutil.which("cmake") or not shutil.which("c++"):
        pytest.skip("no compiler of C++")
    openvino = pytest.importorskip("openvino")
    folder, config = tmp_path_factory.mktemp("judge"), Path(openvino.__path__[0]) / "cmake"
    for words in (
        ["-S", str(EXAMPLES / "cpp"), "-B", str(folder), f"-DOpenVINO_DIR={config}"],
        ["--build", str(folder)],
    ):
        done = subprocess.run(["cmake", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return str(folder / "judge")


def test_a_model_file_runs_in_cpp(judge: str, parts: Path, file: Path, tmp_path: Path) -> None:
    if file.name == "format2.blemish":
        darken(parts)
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path / "unzipped")
    picture = tmp_path / "part.ppm"
    words = [judge, str(tmp_path / "unzipped"), str(picture)]
    for path, verdict in zip(images.list_images(parts), expected(parts, file), strict=True):
        Image.fromarray(images.resize(images.read(path), (64, 64))).save(picture)
        ((label, score, _),) = rows(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        assert label == verdict.label
        assert float(score) == pytest.approx(verdict.score, rel=1e-4, abs=1e-4)
    Image.fromarray(np.zeros((32, 64, 3), np.uint8)).save(picture)
    refused = subprocess.run(words, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.endswith("part.ppm is no PPM of 64 x 64\n")
