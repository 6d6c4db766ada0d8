"""What `gpu.py` found as a page in Markdown, beside the published figures. Reads only what the JSON holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpu_job import PRECISIONS
from gpu_times import FORMS

from blemish.benchmark import tables

Found = Mapping[str, Any]
MARKS = {True: " pass", False: " **FAIL**", None: ""}


def published() -> dict[str, Any]:
    """Return the published figures: their sources, and the figures of each method in lower case."""
    sources, ((_, *columns), *lines) = tables.published()
    figures = {
        name.lower(): {column: float(cell) for column, cell in zip(columns, cells, strict=True) if cell}
        for name, *cells in lines
    }
    return {"sources": sources, "columns": columns, "figures": figures}


def page(found: Found) -> str:
    """Write the whole page."""
    sections = (
        ("On a GPU", introduction(found)),
        ("Beside the published figures", beside(found)),
        ("Does the card compute what the processor computes?", [*judging(found), "", *learning(found)]),
        ("Training", training(found)),
        ("Inference", inference(found)),
        ("What was done", done(found)),
    )
    lines: list[str] = []
    for number, (title, content) in enumerate(sections):
        lines += ["#" * (1 + (number > 0)) + f" {title}", "", *content, ""]
    return "\n".join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    rule = ["---"] * len(head)
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in (head, rule, *rows)]
    return [f"| {' | '.join(row)} |" for row in escaped]


def shown(value: float | None, form: str = ".2f") -> str:
    """Format a number, or nothing if there is none."""
    return "" if value is None else format(value, form)


# --- sections ---


def introduction(found: Found) -> list[str]:
    """Describe the card and the command."""
    about = found["about"]
    machine = about["machine"]
    card = [
        about["card"],
        *(f"{about[name]}" for name in ("memory", "power_limit", "highest_clock") if name in about),
    ]
    software = {"CUDA": about["cuda"], "cuDNN": about["cudnn"], **machine["versions"]}
    facts = {
        "Card": ", ".join(card),
        "Driver": about.get("driver", ""),
        "Busy before": about.get("busy_before", ""),
        "Processor": f"{machine['processor']}, {machine['cores']} cores",
        "Software": ", ".join(f"{name} {version}" for name, version in software.items() if version),
        "Date": about["date"],
        "Command": f"`{about['command']}`",
        "Time": f"{shown(about.get('seconds'), '.0f')} s of at most {60 * about['minutes']:.0f} s",
    }
    lines = table(["", ""], [[name, value] for name, value in facts.items() if value])
    if about["dry_run"]:
        lines += [
            "",
            "**A dry run: tiny networks with random weights on the processor. The figures mean nothing.**",
        ]
    if about.get("others_on_the_card"):
        lines += [
            "",
            f"**{about['others_on_the_card']} other processes were on the card: the times are theirs too.**",
        ]
    return lines


def networks(found: Found, place: str = "times") -> Iterator[tuple[str, Found]]:
    """Yield each timed network with its method."""
    for method, about in found["methods"].items():
        for timed in (about.get(place) or {}).values():
            if timed:
                yield method, timed


def named(method: str, timed: Found) -> str:
    """Return a network's name: its method, preset, input and size."""
    height, width = timed["input"]
    return f"{method}, {timed['preset']} ({height} x {width}, {timed['numbers'] / 1e6:.1f} M numbers)"


def pair(milliseconds: float | None, rate: float | None) -> str:
    """Format a latency and a throughput."""
    return f"{shown(milliseconds)} ms, {shown(rate, ',.0f')}/s" if milliseconds or rate else ""


def beside(found: Found) -> list[str]:
    """Compare the times in half precision with the published ones, each with the card that it belongs to."""
    known = found["published"]
    half = found["about"]["half"]
    cards = sorted({column.split()[0] for column in known["columns"]})
    rows = []
    for method, timed in networks(found):
        papers = "paper" if "paper" in found["methods"][method]["times"] else "default"
        figures = known["figures"].get(method, {}) if timed["preset"] == papers else {}
        row = [named(method, timed)]
        for form in ("plain", "graph"):
            each = timed["variants"].get(f"{form}:{half}", {})
            row.append(pair(each.get("median_ms"), each.get("best")))
        row += [pair(figures.get(f"{card} ms"), figures.get(f"{card} images/s")) for card in cards]
        rows.append(row)
    here = found["about"]["card"]
    head = ["Network", f"{here}: plain, {half}", f"{here}: CUDA graph, {half}"]
    return [
        "Latency of one image and the best throughput. The published figures are from other cards and belong "
        "to the papers' networks: those of the preset `paper`, or of the default where it is not listed.",
        "",
        *table([*head, *(f"{card}, published" for card in cards)], rows),
        "",
        *known["sources"].splitlines(),
    ]


def judging(found: Found) -> list[str]:
    """Return the table of scores and maps."""
    rows, limits = [], {}
    every = [about["checks"]["judging"] or () for about in found["methods"].values()]
    known = [
        name for name in PRECISIONS if any(each["precision"] == name for checks in every for each in checks)
    ]
    for method, checks in zip(found["methods"], every, strict=True):
        for name in dict.fromkeys(each["check"] for each in checks):
            cells = {each["precision"]: each for each in checks if each["check"] == name}
            rows.append([f"{method}: {name}", *(cell(cells.get(precision)) for precision in known)])
            limits[name] = [shown(cells.get(each, {}).get("limit"), ".3g") for each in known]
    most = [[f"at most: {name}", *cells] for name, cells in limits.items() if any(cells)]
    return [
        "Scores, labels and maps of a model file, against ONNX Runtime on the processor. Differences of maps "
        "and scores are in standard deviations; the limits are those of `blemish export`.",
        "",
        *table(["", *known], [*rows, *most]),
    ]


def cell(check: Found | None) -> str:
    """Format a check's value and result."""
    return "" if check is None else shown(check["value"], ".2g") + MARKS[check["passed"]]


def learning(found: Found) -> list[str]:
    """Return the table of a few steps, or a fit, on both devices."""
    rows = [
        [f"{method}: {check['check']}", cell(check), shown(check["limit"], ".3g")]
        for method, about in found["methods"].items()
        for check in about["checks"]["learning"] or ()
    ]
    return [
        "A few optimiser steps, or a fit, in float32 on both devices, from the same weights and with the "
        "same random numbers. Differences of losses are shares of the step's loss.",
        "",
        *table(["", "difference", "at most"], rows),
    ]


def training(found: Found) -> list[str]:
    """Return the tables of optimiser steps and of fits."""
    head = [
        "",
        "batch",
        "precision",
        "step, ms",
        "without loading",
        "loading",
        "of it natural images",
        "loss",
    ]
    steps, fits = [], []
    rows = {method: about["training"] for method, about in found["methods"].items()}
    teachers = {f"teacher, {size}": each for size, each in found["distillation"].items()}
    for name, each in (rows | teachers).items():
        if each and "step_ms" in each:
            times = (each.get(key) for key in ("step_ms", "step_alone_ms", "load_ms", "natural_ms"))
            losses = " to ".join(f"{each[key]:.3f}" for key in ("loss_first", "loss_last") if key in each)
            steps.append(
                [name, str(each["batch_size"]), each.get("precision", ""), *map(shown, times), losses]
            )
        elif each and "fit_seconds" in each:
            fits.append(
                [name, str(each["images"]), shown(each["fit_seconds"]), shown(each["seconds"], ".1f")]
            )
    lines = table(head, steps)
    if fits:
        lines += ["", *table(["", "images", "fit, s", "whole command, s"], fits)]
    return [
        "Medians in milliseconds with the default settings. A batch is loaded on one thread of the "
        "processor, during the step before it: where loading takes longer than the step without it, it sets "
        "the pace.",
        "",
        *lines,
    ]


def inference(found: Found) -> list[str]:
    """Return a table for each network."""
    forms = [f"- {name}: {text}" for name, text in FORMS.items()]
    lines = [
        "One image that lies resized on the host; a run copies it to the device, computes, and copies map "
        "and statistics back. The forms take turns in every round for the latency.",
        "",
        *forms,
    ]
    for method, timed in [*networks(found), *networks(found, "compiled")]:
        sizes = list(
            dict.fromkeys(
                size for each in timed["variants"].values() for size in each.get("images_a_second", {})
            )
        )
        rows = []
        for variant, each in timed["variants"].items():
            if "error" in each:
                rows.append([variant, each["error"], *[""] * (3 + len(sizes))])
                continue
            rates = [shown(each.get("images_a_second", {}).get(size), ",.0f") for size in sizes]
            times = [shown(each.get("median_ms"), ".3f"), shown(each.get("p95_ms"), ".3f")]
            rows.append([variant, *times, str(each.get("runs", "")), *rates, shown(each.get("best"), ",.0f")])
        head = ["", "median ms", "p95 ms", "runs", *(f"images/s at {size}" for size in sizes), "best"]
        lines += ["", named(method, timed), "", *table(head, rows)]
    return lines


def done(found: Found) -> list[str]:
    """Return the table of parts and their time."""
    rows = [
        [each["part"], shown(each["share_seconds"], ".0f"), shown(each["seconds"], ".0f"), ended(each)]
        for each in found["parts"]
    ]
    return table(["Part", "share, s", "took, s", "end"], rows)


def ended(part: Found) -> str:
    """Return how a part ended."""
    return f"{part['state']}: {part['error']}" if "error" in part else str(part["state"])
