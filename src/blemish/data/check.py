"""Summarise a data set and report its problems before time is spent on training."""

from __future__ import annotations

import hashlib
import os
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blemish import images
from blemish.data.defects import DefectSizes, shorter_sides, summarise
from blemish.data.layouts import LAYOUTS, recognise, scan
from blemish.data.layouts.folder import GOOD
from blemish.data.layouts.saturation import regions
from blemish.data.shapes import SAME_SHAPE, most_frequent
from blemish.errors import BlemishError, ImageError
from blemish.images.reading import ImageInfo
from blemish.tables import aligned
from blemish.types import Sample, SplitName

FEWEST_GOOD = 10
"""Number of good training images below which a data set is too small: half of them would be held out."""

WIDTH = 100
"""Columns to which the report is wrapped."""

LOSSY_SUFFIXES = (".jpg", ".jpeg", ".webp")
SPLITS: tuple[SplitName, ...] = ("", "train", "validation", "test")

Severity = Literal["problem", "note"]


@dataclass(frozen=True)
class Problem:
    """A problem of the data set, or a note on it."""

    severity: Severity
    """Only problems fail the check."""
    sentence: str


@dataclass(frozen=True)
class Row:
    """The images of one split and kind."""

    split: str
    kind: str
    count: int
    sizes: tuple[tuple[int, int], ...]
    """Heights and widths, most frequent first."""
    modes: tuple[str, ...]
    bits: tuple[int, ...]
    masks: int
    """Number of images with at least one mask."""


@dataclass(frozen=True)
class Report:
    """The result of `check`."""

    root: Path
    layout: str
    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]
    size: tuple[int, int] | None = None
    """Height and width that most images of the most frequent shape have; None if no image can be read."""
    defects: DefectSizes | None = None
    """The size of the marked defects; None without masks."""

    @property
    def passed(self) -> bool:
        """Whether there are no problems, only notes."""
        return all(problem.severity == "note" for problem in self.problems)


@dataclass(frozen=True)
class _Inspected:
    """The properties of a sample's decoded image; `info` is None if decoding failed."""

    sample: Sample
    problems: tuple[Problem, ...]
    sides: tuple[int, ...] = ()
    """Shorter sides of the regions of its mask."""
    info: ImageInfo | None = None
    digest: bytes = b""
    colour: bool = False
    deepest: int = 0
    """Largest pixel value."""


def check(data: str | Path, layout: str = "auto") -> Report:
    """Decode every image and mask of a data set, and report its contents and problems.

    Raises DataError where `scan` does: for an unknown layout or no images at all.
    """
    root = Path(data)
    layout = recognise(root, layout)
    samples = scan(root, layout)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        inspected = list(pool.map(_inspect, samples))
    whole = [item for item in inspected if item.info]
    problems = [
        *(problem for item in inspected for problem in item.problems),
        *_stray_masks(samples, LAYOUTS[layout].mask_files(root)),
        *_repeated(whole),
        *_too_few(samples),
        *_mixed_colour(whole),
        *_mixed_sizes(whole),
        *_deep(whole),
        *_unmasked(samples),
        *_lossy_masks(samples),
    ]
    return Report(
        root,
        layout,
        tuple(_rows(inspected)),
        tuple(problems),
        _usual_size(whole),
        summarise([side for item in inspected for side in item.sides]),
    )


def format_report(report: Report) -> str:
    """Format a report for a terminal: a table, then the problems and the notes, each as a list item."""
    total = sum(row.count for row in report.rows)
    lines = [f"{report.root}: {total} images, layout {report.layout}", "", _table(report.rows)]
    for severity in ("problem", "note"):
        sentences = [problem.sentence for problem in report.problems if problem.severity == severity]
        if sentences:
            lines += ["", f"{len(sentences)} {severity}{'s' if len(sentences) > 1 else ''}"]
        for sentence in sentences:
            lines += textwrap.wrap(
                sentence, WIDTH, initial_indent="- ", subsequent_indent="  ", break_long_words=False
            )
    return "\n".join(lines if not report.passed else [*lines, "", "no problems found"])


def _inspect(sample: Sample) -> _Inspected:
    try:
        info = images.describe(sample.path)
        image = images.read(sample.path)
    except ImageError as error:
        return _Inspected(sample, (Problem("problem", str(error)),))
    problems, sides = _inspect_mask(sample, (image.shape[0], image.shape[1]))
    return _Inspected(
        sample,
        problems,
        sides,
        info,
        hashlib.sha256(str(image.shape).encode() + image.tobytes()).digest(),
        bool((image != image[..., :1]).any()),
        int(image.max()),
    )


def _inspect_mask(sample: Sample, size: tuple[int, int]) -> tuple[tuple[Problem, ...], tuple[int, ...]]:
    """Return the problems of a sample's masks, and the shorter sides of the regions that they mark."""
    try:
        mask = images.read_mask(sample.masks, size)
        if sample.saturations:
            regions(sample, size)
    except BlemishError as error:
        return (Problem("problem", str(error)),), ()
    if mask.any() or not sample.masks:
        return (), shorter_sides(mask)
    names = " and ".join(str(path) for path in sample.masks)
    return (Problem("problem", f"{names} marks no pixel; expected the defect in {sample.path}"),), ()


def _usual_size(whole: Sequence[_Inspected]) -> tuple[int, int] | None:
    """Return the most frequent size of the images that can be trained on or, without such, of all."""
    sizes = [(item.sample.split, item.info.size) for item in whole if item.info]
    chosen = [size for split, size in sizes if split in ("train", "")] or [size for _, size in sizes]
    return most_frequent(chosen).size if chosen else None


def _stray_masks(samples: Sequence[Sample], mask_files: Sequence[Path]) -> Iterator[Problem]:
    used = {mask for sample in samples for mask in sample.masks}
    for mask in mask_files:
        if mask not in used:
            yield Problem(
                "problem", f"no image matches the name of the mask {mask}; expected one of the same kind"
            )


def _repeated(whole: Sequence[_Inspected]) -> Iterator[Problem]:
    """Find images with identical pixels: harmless within one split, a leak between train and test."""
    groups: defaultdict[bytes, list[Sample]] = defaultdict(list)
    for item in whole:
        groups[item.digest].append(item.sample)
    for group in groups.values():
        if len(group) < 2:
            continue
        names = " and ".join(str(sample.path) for sample in group)
        if len({sample.label for sample in group}) > 1:
            yield Problem(
                "problem", f"{names} are the same image, labelled both good and defective; expected one label"
            )
        elif len({sample.split for sample in group}) > 1 or not group[0].split:
            yield Problem(
                "problem", f"{names} are the same image; expected only one of them, or all in the same split"
            )
        else:
            yield Problem("note", f"{names} are the same image")


def _too_few(samples: Sequence[Sample]) -> Iterator[Problem]:
    good = sum(sample.label == 0 and sample.split in ("train", "") for sample in samples)
    if good < FEWEST_GOOD:
        yield Problem("problem", f"found {good} good images to train on; expected at least {FEWEST_GOOD}")


def _mixed_colour(whole: Sequence[_Inspected]) -> Iterator[Problem]:
    """Find a mixture of colour and grey images, judged by pixels: grey images are often stored as RGB."""
    colour = [item.sample.path for item in whole if item.colour]
    grey = [item.sample.path for item in whole if not item.colour]
    if colour and grey:
        fewer, word = (colour, "in colour") if len(colour) <= len(grey) else (grey, "grey")
        verb = "is" if len(fewer) == 1 else "are"
        yield Problem(
            "problem",
            f"{len(fewer)} of {len(whole)} images {verb} {word}, unlike the others; the first is {fewer[0]}",
        )


def _mixed_sizes(whole: Sequence[_Inspected]) -> Iterator[Problem]:
    """Find images of several sizes: a note if their shape is the same, a problem if resizing distorts it."""
    first = {item.info.size: item.sample.path for item in reversed(whole) if item.info}
    counts = Counter(item.info.size for item in whole if item.info).most_common()
    if len(counts) < 2:
        return
    named = ", ".join(f"{_size(size)} ({count}, the first is {first[size]})" for size, count in counts[:3])
    named += ", ..." if len(counts) > 3 else ""
    shapes = [height / width for height, width in first]
    if max(shapes) <= min(shapes) * (1 + SAME_SHAPE):
        yield Problem("note", f"images have {len(counts)} sizes: {named}")
    else:
        yield Problem(
            "problem", f"images have {len(counts)} sizes of different shape: {named}; expected one shape"
        )


def _deep(whole: Sequence[_Inspected]) -> Iterator[Problem]:
    deepest = [item.deepest for item in whole if item.info and item.info.bits > 8]
    if deepest:
        white = int(images.white_level(max(deepest)))
        yield Problem(
            "note",
            f"{len(deepest)} of {len(whole)} images have more than 8 bits; their largest value is "
            f"{max(deepest)}, so {white.bit_length()} bits are in use and white is {white}",
        )


def _unmasked(samples: Sequence[Sample]) -> Iterator[Problem]:
    defects = [sample for sample in samples if sample.label == 1]
    unmasked = [sample for sample in defects if not sample.masks]
    if 0 < len(unmasked) < len(defects):
        yield Problem(
            "note",
            f"{len(unmasked)} of {len(defects)} defective images have no mask and are left out of pixel "
            f"metrics; the first is {unmasked[0].path}",
        )


def _lossy_masks(samples: Sequence[Sample]) -> Iterator[Problem]:
    lossy = [mask for sample in samples for mask in sample.masks if mask.suffix.lower() in LOSSY_SUFFIXES]
    if lossy:
        yield Problem(
            "note",
            f"{len(lossy)} masks are JPEG or WebP, of which values from {images.LOSSY_MASK_LEVEL} count; "
            f"PNG would be exact; the first is {lossy[0]}",
        )


def _rows(inspected: Iterable[_Inspected]) -> Iterator[Row]:
    """Group the samples by split and kind: train before test, good before defective."""
    groups: defaultdict[tuple[int, bool, str], list[_Inspected]] = defaultdict(list)
    for item in inspected:
        groups[SPLITS.index(item.sample.split), item.sample.label == 1, item.sample.kind].append(item)
    for (split, _, kind), group in sorted(groups.items()):
        infos = [item.info for item in group if item.info]
        yield Row(
            SPLITS[split],
            kind,
            len(group),
            tuple(size for size, _ in Counter(info.size for info in infos).most_common()),
            tuple(mode for mode, _ in Counter(info.mode for info in infos).most_common()),
            tuple(bits for bits, _ in Counter(info.bits for info in infos).most_common()),
            sum(bool(item.sample.masks) for item in group),
        )


def _table(rows: Sequence[Row]) -> str:
    """Format the rows as aligned columns, with the numbers of images and masks right-aligned."""
    head = ("split", "kind", "images", "height x width", "mode", "bits", "masks")
    return aligned([head, *(_cells(row) for row in rows)], left=(0, 1, 3, 4, 5))


def _cells(row: Row) -> tuple[str, ...]:
    more = f" and {len(row.sizes) - 1} more" if len(row.sizes) > 1 else ""
    return (
        row.split or "-",
        row.kind,
        str(row.count),
        (_size(row.sizes[0]) if row.sizes else "-") + more,
        ", ".join(row.modes) or "-",
        ", ".join(map(str, row.bits)) or "-",
        "-" if row.kind == GOOD else str(row.masks),
    )


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
