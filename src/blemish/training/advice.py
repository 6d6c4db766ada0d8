"""Check a data set, and advise a size of the network's input where its defects are small."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from blemish.data.check import Problem, Report
from blemish.data.check import check as check_images
from blemish.detectors import registry, sizing
from blemish.detectors.settings import Config
from blemish.detectors.sizing import Size, written


def check(data: str | Path, layout: str = "auto", *, defect_size: str | float | None = None) -> Report:
    """Decode every image and mask of a data set, and report its contents, problems, and advice as notes.

    defect_size: shorter side of the smallest defect that must be found, in pixels of the image, or as text
    such as "12px"; None: the 10 % quantile of the marked defects. There is advice for each method whose
    default size would show too little of such a defect; it needs torch. Raises ConfigError for a defect size
    that does not fit, and DataError for an unknown layout or no images at all.
    """
    asked = None if defect_size is None else sizing.read_defect_size(defect_size)
    report = check_images(data, layout)
    notes = tuple(Problem("note", sentence) for sentence in advise(report, asked))
    return dataclasses.replace(report, problems=report.problems + notes)


def advise(report: Report, asked: float | None = None) -> Iterator[str]:
    """Yield sentences on the size of the network's input; none if there is nothing to advise.

    asked: the size of a defect, which gets an answer in any case; None: that of the marked defects.
    """
    marked = report.defects
    if report.size is None or (asked is None and marked is None):
        return
    try:
        configs = usual_configs(report)
    except ModuleNotFoundError:  # without torch, nothing is trained on this PC
        if asked is not None:
            yield "which size each method needs is known only where blemish[train] is installed"
        return
    if asked is not None:
        found = list(advise_methods(report.size, asked, configs, in_any_case=True))
        yield from found or [f"defects of {asked:g} pixels are large enough for every method's default size"]
    elif marked is not None and (found := list(advise_methods(report.size, marked.small, configs))):
        yield (
            f"{marked.regions} regions are marked as defects: their shorter side is {marked.small} pixels at "
            f"the 10 % quantile and {marked.median:g} at the median"
        )
        yield from found


def usual_configs(report: Report) -> dict[str, Config]:
    """Return what each method would be trained with on the data set, which may have defects to learn from."""
    labelled = any(row.split == "train" and row.kind != "good" for row in report.rows)
    configs = {}
    for name in registry.METHODS:
        able = registry.preset(name, "default").regimes
        configs[name] = registry.configure(
            name, supervision="full" if labelled and "full" in able else "none"
        )
    return configs


def advise_methods(
    image: Size, defect: float, configs: dict[str, Config], *, in_any_case: bool = False
) -> Iterator[str]:
    """Yield a sentence for the methods whose default size shows too little of a defect, grouped by size.

    defect: its shorter side in image pixels. in_any_case: whether to mention methods for which no larger size
    helps, since the images themselves show too little.
    """
    groups: defaultdict[tuple[Size, Size, int], list[str]] = defaultdict(list)
    for name, config in configs.items():
        usual, larger = sizing.for_shape(config, image), sizing.for_defect(config, image, defect)
        enough = sizing.coverage(image, usual, defect) >= config.NEED
        if not enough and (in_any_case or larger != usual):
            groups[usual, larger, config.NEED].append(name)
    for (usual, larger, need), names in groups.items():
        covered = sizing.coverage(image, usual, defect)
        short = (
            f"with {', '.join(names)}, a defect of {defect:g} pixels covers {covered:g} pixels of the "
            f"default {written(usual)}, of {need} needed"
        )
        if larger == usual:
            yield f"{short}; a larger size would not help, only images with more pixels"
            continue
        more, then = math.prod(larger) / math.prod(usual), sizing.coverage(image, larger, defect)
        advice = f"try --defect-size {defect:g}px ({written(larger)}, {more:.2g} times the pixels"
        yield f"{short}: {advice}{')' if then >= need else f'; it then covers {then:g})'}"
