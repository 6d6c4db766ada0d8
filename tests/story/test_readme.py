"""The README and the docs are true: commands run, options and defaults exist, links lead somewhere."""

import ast
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import astuple
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

import blemish
from blemish.cli import main
from blemish.demo import dataset as demo
from blemish.demo.defects import DEFECTS
from blemish.detectors import sizing
from blemish.detectors.registry import METHODS, configure
from blemish.evaluation.metric_table import METRICS
from blemish.exporting.gate import LIMITS
from blemish.exporting.pipeline import Request
from blemish.images.reading import read
from blemish.inference.calibration import promised_rate
from blemish.inference.choice import Choice
from blemish.progress import Report, Stop

ROOT = Path(__file__).parents[2]
SOURCE = Path(blemish.__file__).parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
QUICK = {
    "train": ["--steps", "3", "--image-size", "64x64"],
    "benchmark": ["--seconds", "0.2", "--rounds", "1", "--threads", "1"],
}
"""What the tests append to commands that would take long."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(page: Path) -> list[list[str]]:
    """Return the words of every command in a page's shell blocks."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def without_program(words: list[str]) -> list[str]:
    return [*words[1:], *QUICK.get(words[1], [])]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with the images that the README mentions, under the names that it uses."""
    demo.draw(tmp_path / "MY_IMAGES", 0, train=10, test_good=2, per_kind=1, size=demo.SMALLEST)
    demo.draw(tmp_path / "drawn", 1, train=10, test_good=1, per_kind=1, size=demo.SMALLEST)
    (tmp_path / "drawn/test").rename(tmp_path / "NEW_IMAGES")
    (tmp_path / "drawn/train/good").rename(tmp_path / "MORE_GOOD_IMAGES")
    (tmp_path / "part.png").write_bytes((tmp_path / "NEW_IMAGES/crack/000.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_readme_runs(images: Path) -> None:
    ours = [without_program(words) for words in commands(README) if words[0] == "blemish"]
    assert {words[0] for words in ours} == {
        "check",
        "train",
        "evaluate",
        "predict",
        "calibrate",
        "export",
        "benchmark",
    }
    for words in ours:
        assert main.main(words) == 0, words
    assert (images / "report.html").stat().st_size > 10_000
    assert len(list((images / "overlays").rglob("*.png"))) == 1 + len(DEFECTS)
    tuned, mine = blemish.load("tuned.blemish"), blemish.load("mine.blemish")
    assert len(tuned.calibration.scores) == 10 > len(mine.calibration.scores)
    files, _, lines = run("scripts/lines", "mine.blemish").splitlines()[-1].split()
    assert f"{files} files and about {round(int(lines), -2)} lines" in README.read_text(encoding="utf-8")
    (images / "demo").mkdir()
    (images / "MY_IMAGES").rename(images / "demo/parts")
    (images / "mine.blemish").rename(images / "demo/demo.blemish")
    run("scripts/picture", "demo", "--out", "picture.png")
    assert read(images / "picture.png").shape[2] == 3


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_python_of_the_readme_and_the_docs_runs(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = partial(blemish.train, steps=3, settings={"image_size": "64x64"})
    monkeypatch.setattr(blemish, "train", short)
    (block,) = blocks(README, "python")
    assert len([line for line in block.splitlines() if line and not line.startswith("import")]) == 6
    exec(block, {})
    verdict, _, shape = capsys.readouterr().out.splitlines()
    assert verdict.split()[0] in ("ok", "review", "defect")
    assert shape == str((demo.SMALLEST, demo.SMALLEST))

    def ask_to_train(data: str, *, report: Report, stop: Stop, **options: Any) -> blemish.Predictor:
        """Check the request, and load the existing model instead."""
        request = blemish.TrainingRequest(data=Path(data), **options)
        configure(str(request.model), request.preset, request.settings)
        report(blemish.Event("training", 0, request.steps or 0))
        assert not stop()
        return blemish.load(request.out)

    def ask_to_export(model: str, data: str, *, out: str, **options: Any) -> None:
        """Check the request, and copy the existing model instead."""
        assert Request(out=Path(out), **options).choice == Choice("openvino", "int8")
        shutil.copy(model, out)

    monkeypatch.setattr(blemish, "train", ask_to_train)
    monkeypatch.setattr(blemish, "export", ask_to_export)
    pages = {page.stem: blocks(page, "python") for page in PAGES if page != README}
    assert {name for name, found in pages.items() if found} == {
        "inference",
        "model-file",
        "thresholds",
        "training",
    }
    for block in (block for found in pages.values() for block in found):
        exec(block, {})
    assert len(blemish.load("tuned.blemish").calibration.scores) == 10


def test_the_startup_benchmark_finds_nothing_heavy() -> None:
    assert re.search(r"^modules +blemish; ", run("benchmarks/startup.py", "--runs", "1"), re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_exists(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for words in commands(page):
        program, *rest = words
        if program == "blemish":
            options = main.parser().parse_args(rest)
            if rest[0] == "train":
                given = dict(text.split("=", 1) for text in options.set)
                configure(options.model or "supersimplenet", options.preset, given)
        elif program == "make":
            assert {word for word in rest if "=" not in word} <= set(targets), words
        elif program == "pip":
            assert rest[0] == "install"
            assert set(re.findall(r"\[(\w+)\]", rest[1])) <= set(extras), words
        else:
            paths = [program, *rest] if program != "python" else rest
            assert (ROOT / paths[0]).is_file(), words
            assert all((ROOT / word).is_file() for word in paths if word.endswith(".py")), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            assert heading in [re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings]


# --- names and numbers in the docs ---


@cache
def definitions() -> set[str]:
    """Return the names that modules define, bare and as module.name, and their methods as Class.method."""
    found: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            match node:
                case ast.FunctionDef(name) | ast.ClassDef(name):
                    names = [name]
                case ast.Assign(targets=[ast.Name(name)]) | ast.AnnAssign(target=ast.Name(name)):
                    names = [name]
                case _:
                    continue
            if isinstance(node, ast.ClassDef):
                methods = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
                found |= {f"{node.name}.{method}" for method in methods}
            found |= {*names, *(f"{path.stem}.{each}" for each in names)}
    return found


def test_every_place_in_the_code_that_the_papers_page_names_exists() -> None:
    text = (ROOT / "docs/papers.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| In the paper \| Where \|.+\n\| -.+\n((?:\|.+\n)+)", text, re.M)
    cells = [row.split("|")[2] for table in tables for row in table.splitlines()]
    places = [name for cell in cells for name in re.findall(r"`(.+?)`", cell)]
    assert len(places) > 30
    assert {name for name in places if not name.startswith("blemish.")} <= definitions()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_dotted_name_exists(page: Path) -> None:
    for name in re.findall(r"`(blemish(?:\.\w+)+)", page.read_text(encoding="utf-8")):
        assert pkgutil.resolve_name(name) is not None


def rows_of(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without the table's own head."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").split(f"{heading}\n")[1]
    table = re.findall(r"^\|.+\|$", text.split("\n#")[0], re.M)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table[2:]]


def test_the_table_of_errors_is_true() -> None:
    named = [row[0].strip("`") for row in rows_of("errors.md", "## In Python")]
    assert sorted(named) == sorted(each.__name__ for each in blemish.BlemishError.__subclasses__())


def test_the_table_of_metrics_is_true() -> None:
    named = [name.strip() for row in rows_of("evaluation.md", "## The metrics") for name in row[0].split(",")]
    assert named == [metric.column for metric in METRICS.values()]


def test_the_table_of_limits_on_exports_is_true() -> None:
    stated = [row[1:] for row in rows_of("inference.md", "## The gate")]
    numbers = [
        [float(cell.removesuffix(" %")) / (100 if cell.endswith("%") else 1) for cell in row]
        for row in stated
    ]
    assert numbers == [list(limits) for limits in zip(*map(astuple, LIMITS.values()), strict=True)]


def test_the_table_of_guaranteed_rates_is_true() -> None:
    for count, stated in rows_of("thresholds.md", "## How many held-out images"):
        rate = 100 * promised_rate(int(count), 0, 0.95)
        number = stated.removesuffix(" %")
        digits = len(number.partition(".")[2])
        assert number == f"{rate:.{digits}f}"


def test_the_table_of_image_sizes_is_true() -> None:
    for image, *stated in rows_of("training.md", "## Image size"):
        height, width = map(int, image.split(" x "))
        for method, size in zip(
            ("patchcore", "supersimplenet", "padim", "efficientad-s"), stated, strict=True
        ):
            assert sizing.written(sizing.for_shape(configure(method), (height, width))) == size


@pytest.mark.parametrize("method", METHODS)
def test_the_tables_of_settings_are_true(method: str) -> None:
    """A row is | `name` | default | paper | what it is |, with "same" where the paper has the default."""
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    section = text.split(f"### `{method.removesuffix('-m').removesuffix('-s')}")[1].split("\n#")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.+?) \|", section, re.M)
    default, paper = vars(configure(method)), vars(configure(method, "paper"))
    own = {"efficientad-m": {"size": "medium", "steps": "1000"}}.get(method, {})
    stated = {name: value.strip('"') for name, value, _ in rows} | own
    assert stated == {name: shown(value) for name, value in default.items()}
    stated |= {name: value.strip("`") for name, _, value in rows if value != "same"}
    assert stated == {name: shown(value) for name, value in paper.items()}


def shown(value: object) -> str:
    """Write a setting as `--set` takes it."""
    if isinstance(value, tuple):
        return ("x" if value and isinstance(value[0], int) else ",").join(map(str, value)) or "(empty)"
    return str(value).lower() if isinstance(value, bool) else str(value)
