"""What the README and the docs say is so: commands run, options and defaults exist, links lead somewhere."""

import re
import shlex
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest

import blemish
from blemish import demo
from blemish.cli import main
from blemish.demo import dataset as demo
from blemish.detectors.registry import METHODS, configure
from blemish.images.reading import read

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
QUICK = {
    "train": ["--steps", "3", "--image-size", "64x64"],
    "benchmark": ["--seconds", "0.2", "--rounds", "1", "--threads", "1"],
}
"""What the test appends to commands that would take long."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(page: Path) -> list[list[str]]:
    """Give the words of every command in a page's shell blocks."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def without_program(words: list[str]) -> list[str]:
    return [*words[1:], *QUICK.get(words[1], [])]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder that has the images of which the README speaks, under the names it gives them."""
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
    assert len(list((images / "overlays").rglob("*.png"))) == 1 + len(demo.DEFECTS)
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


def test_the_python_of_the_readme_runs(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(blemish, "train", partial(blemish.train, steps=3, settings={"image_size": "64x64"}))
    (block,) = blocks(README, "python")
    assert len([line for line in block.splitlines() if line and not line.startswith("import")]) == 6
    exec(block, {})
    verdict, _, shape = capsys.readouterr().out.splitlines()
    assert verdict.split()[0] in ("ok", "review", "defect")
    assert shape == str((demo.SMALLEST, demo.SMALLEST))
    for block in blocks(ROOT / "docs/model-file.md", "python"):
        exec(block, {})


def test_the_benchmark_of_the_start_says_that_nothing_heavy_is_loaded() -> None:
    assert re.search(
        r"^modules +blemish; of the standard library ", run("benchmarks/startup.py", "--runs", "1"), re.M
    )


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
            script = rest[0] if program == "python" else program
            assert (ROOT / script).is_file(), words


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


@pytest.mark.parametrize("method", METHODS)
def test_the_tables_of_settings_are_true(method: str) -> None:
    """A row is | `name` | default | paper | what it is |, with "same" where the paper has the default."""
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    section = text.split(f"### `{method.removesuffix('-m').removesuffix('-s')}")[1].split("\n#")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.+?) \|", section, re.M)
    default, paper = vars(configure(method)), vars(configure(method, "paper"))
    size = {"efficientad-m": {"size": "medium"}}.get(method, {})
    stated = {name: value.strip('"') for name, value, _ in rows}
    assert stated | size == {name: shown(value) for name, value in default.items()}
    stated |= {name: value.strip("`") for name, _, value in rows if value != "same"}
    assert stated | size == {name: shown(value) for name, value in paper.items()}


def shown(value: object) -> str:
    """Write a setting as `--set` takes it."""
    if isinstance(value, tuple):
        return ("x" if value and isinstance(value[0], int) else ",").join(map(str, value)) or "(empty)"
    return str(value).lower() if isinstance(value, bool) else str(value)
