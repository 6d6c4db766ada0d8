"""Checks of what every method promises; each raises AssertionError that says what was broken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors

from blemish import seeding
from blemish.detectors.base import Detector
from blemish.detectors.settings import as_json
from blemish.errors import BlemishError, ConfigError, ExportError, StoppedError
from blemish.evaluation.run import evaluate
from blemish.exporting.pipeline import export
from blemish.inference import bundle
from blemish.inference.choice import Choice
from blemish.inference.engines import open_graph
from blemish.inference.predictor import load
from blemish.progress import Event
from blemish.testing import parts
from blemish.testing.subject import Subject, labelled_batch
from blemish.training import run
from blemish.training.finalise import TOLERANCE, compare
from blemish.types import Batch, Supervision

LEARNED: Mapping[Supervision, tuple[int, int]] = {
    "none": (0, 0),
    "weak": (4, 0),
    "mixed": (4, 2),
    "full": (4, 4),
}
"""Training defects that count, and those of them with masks."""


def require(condition: bool, broken: str) -> None:
    """Raise AssertionError, which says what was broken, unless the condition holds."""
    if not condition:
        raise AssertionError(broken)


def near(found: Any, expected: Any, what: str, absolute: float = 0.0) -> None:
    """Require that arrays agree up to the rounding that another batch size brings about."""
    bound = absolute or 1e-4 * float(np.abs(np.asarray(expected)).max())
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-4, atol=bound, err_msg=what)


# --- scoring ---


def outputs_are_finite_and_have_their_shapes(subject: Subject, folder: Path) -> None:
    """Maps are (B, H, W), statistics (B, K), parts (B, h, w), all float32 and finite."""
    detector, (height, width) = subject.trained(), subject.config.image_size
    with torch.no_grad():
        maps, statistics, *others = detector(subject.images())
    require(maps.shape == (3, height, width), f"the map is {tuple(maps.shape)}")
    count = len(subject.config.statistics)
    require(statistics.shape == (3, count), f"the statistics are {tuple(statistics.shape)}")
    require(detector.outputs[:2] == ("map", "statistics"), f"the outputs are called {detector.outputs}")
    require(len(others) == len(detector.outputs) - 2, f"{len(others)} parts came for {detector.outputs}")
    for name, output in zip(detector.outputs, (maps, statistics, *others), strict=True):
        require(output.dtype == torch.float32, f"{name} is {output.dtype}")
        require(bool(output.isfinite().all()), f"{name} is not finite")
    for part in others:
        require(part.ndim == 3 and part.shape[0] == 3, f"a part is {tuple(part.shape)}")
    if "maximum" in subject.config.statistics:
        place = subject.config.statistics.index("maximum")
        require(torch.equal(statistics[:, place], maps.amax((1, 2))), "maximum is not that of the map")


def an_image_scores_the_same_alone_and_in_a_batch(subject: Subject, folder: Path) -> None:
    """Company changes no score and no map, in the model file's graph and in the detector."""
    images = [parts.part(60), parts.spotted(61)[0], parts.part(62, (200, 70))]
    for image, found in zip(images, subject.model.predict_batch(images), strict=True):
        alone = subject.model.predict(image)
        near(found.score, alone.score, "score", absolute=1e-4)
        near(found.map, alone.map, "map")
    detector, several = subject.trained(), subject.images()
    with torch.no_grad():
        whole = detector(several)
        for row in range(len(several)):
            for name, rows, one in zip(
                detector.outputs, whole, detector(several[row : row + 1]), strict=True
            ):
                # A statistic may be as good as 0, where nothing is left to be relative to.
                near(rows[row], one[0], name, absolute=0.0 if one[0].ndim == 2 else 1e-6)


def scoring_changes_nothing(subject: Subject, folder: Path) -> None:
    """Scoring twice gives the same numbers, and leaves every parameter and buffer as it was."""
    detector, images = subject.trained(), subject.images()
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    with torch.no_grad():
        first, second = detector(images), detector(images)
    for name, one, other in zip(detector.outputs, first, second, strict=True):
        require(torch.equal(one, other), f"{name} differs the second time")
    for key, value in detector.state_dict().items():
        require(torch.equal(value, before[key]), f"scoring changed {key}")


def any_image_size_gets_a_map_of_its_own_size(subject: Subject, folder: Path) -> None:
    """Verdicts on images of any size hold finite maps of that size."""
    for size in ((64, 64), (37, 150), (300, 41)):
        verdict = subject.model.predict(parts.part(63, size), parts=True, full_size=True)
        require(set(verdict.parts) == set(subject.model.engine.outputs[2:]), f"parts {set(verdict.parts)}")
        for each in (verdict.map, *verdict.parts.values()):
            require(each.shape == size, f"a map of an image of {size} is {each.shape}")
            require(bool(np.isfinite(each).all()), f"a map of an image of {size} is not finite")
        require(bool(np.isfinite(verdict.score)) and 0 < verdict.p_value <= 1, f"verdict {verdict}")


def a_planted_defect_outscores_good_parts(subject: Subject, folder: Path) -> None:
    """Every part with a checkered spot scores above every good one, and is called a defect."""
    size = (80, 100)
    good = [subject.model.predict(parts.part(70 + n, size)).score for n in range(4)]
    bad = [subject.model.predict(parts.spotted(80 + n, size)[0]) for n in range(4)]
    scores = [verdict.score for verdict in bad]
    require(min(scores) > max(good), f"defective parts score {scores}, good ones {good}")
    require({verdict.label for verdict in bad} == {"defect"}, f"labels {[v.label for v in bad]}")


def the_map_points_at_a_planted_defect(subject: Subject, folder: Path) -> None:
    """The map is higher on a spot than elsewhere, by more than its deviation there."""
    for number in range(3):
        image, mask = parts.spotted(90 + number, (128, 128))
        inner = np.zeros_like(mask)
        inner[20:-20, 20:-20] = True  # some methods are blind at the edges
        found = subject.model.predict(image, full_size=True).map
        on, off = found[mask & inner], found[inner & ~mask]
        require(on.mean() > off.mean() + off.std(), f"{on.mean()} on the spot, {off.mean()} elsewhere")


# --- the model file ---


def a_saved_model_scores_as_its_source(subject: Subject, folder: Path) -> None:
    """The file's graph gives what training returned, and what the detector with the file's weights gives."""
    with load(subject.request.out) as saved:
        for image in (parts.part(64), parts.spotted(65, (120, 90))[0]):
            before, after = subject.model.predict(image), saved.predict(image)
            require(after == before, f"{after} after {before}")
            require(np.array_equal(after.map, before.map), "another map")
    detector, images = subject.trained(), subject.images()
    graph = open_graph(bundle.read(subject.request.out).graph, detector.outputs, Choice())
    require(compare(detector, graph, [images[:1], images]) <= TOLERANCE, "the graph differs")


def the_comparison_refuses_another_model(subject: Subject, folder: Path) -> None:
    """The graph of one model is not taken for that of an untrained one."""
    other = subject.detector(seed=5).eval()
    graph = open_graph(bundle.read(subject.request.out).graph, other.outputs, Choice())
    refuses(ExportError, lambda: compare(other, graph, [subject.images()]), "another model's graph")


def the_file_says_what_was_asked_for(subject: Subject, folder: Path) -> None:
    """The manifest names method, config, supervision, steps and images."""
    manifest = subject.model.manifest
    facts = manifest.training
    counts = (facts.good_images, facts.defective_images, facts.masked_images)
    good = 10 if subject.leaves_one_out else 5
    for name, found, expected in (
        ("method", manifest.method, subject.name),
        ("config", manifest.config, as_json(subject.config)),
        ("image size", manifest.preprocessing.image_size, subject.config.image_size),
        ("steps", facts.steps, subject.request.steps or 0),
        ("supervision", facts.run.supervision, subject.supervision),
        ("images", counts, (good, *LEARNED[subject.supervision])),
        ("images behind the thresholds", len(manifest.calibration.scores), good),
        ("held-out images", facts.held_out_images, 10 - good),
    ):
        require(found == expected, f"the file says {name} {found}; expected {expected}")


def an_export_agrees_with_the_model(subject: Subject, folder: Path) -> None:
    """An ONNX file passes the gate, and the exported model judges as the trained one."""
    out = folder / "exported.blemish"
    export(subject.request.out, subject.request.data, out=out, format="onnx")
    with load(out) as exported:
        image = parts.spotted(66, (90, 90))[0]
        before, after = subject.model.predict(image), exported.predict(image)
        require(after.label == before.label, f"{after.label} after {before.label}")
        near(after.map, before.map, "map")


def an_evaluation_measures_it(subject: Subject, folder: Path) -> None:
    """Every metric of the test set is defined, and the planted defects are told from good parts."""
    row = evaluate(subject.model, subject.request.data).rows[0]
    require(row.image_auroc == 1.0, f"image AUROC {row.image_auroc}")
    for name in ("image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro"):
        require(getattr(row, name) is not None, f"{name} is not defined")


# --- training ---


def an_interrupted_run_ends_in_the_same_bytes(subject: Subject, folder: Path) -> None:
    """A run that is stopped and resumed, or begun anew, ends in the same weights and thresholds."""
    out, wanted = folder / "again.blemish", (subject.request.steps or 0) // 2
    done = 0

    def watch(event: Event) -> None:
        nonlocal done
        if event.phase == "training":
            done = event.step

    changes: dict[str, Any] = {}
    if subject.has_steps:
        request = dataclasses.replace(subject.request, out=out)
        stopped = refuses(
            StoppedError,
            lambda: run.run(request, report=watch, stop=lambda: done >= wanted),
            "to go on when asked to stop",
        )
        require(f"after step {max(wanted, 1)} of" in stopped, stopped)
        changes = {"resume": True}
    subject.train(out, **changes)
    first, again = bundle.read(subject.request.out), bundle.read(out)
    require(again.manifest.calibration == first.manifest.calibration, "other thresholds")
    stored, found = load_tensors(first.weights), load_tensors(again.weights)
    for name, value in stored.items():
        require(torch.equal(value, found[name]), f"another {name}")


def another_seed_gives_other_weights(subject: Subject, folder: Path) -> None:
    """What is drawn at random before the first step depends on the seed."""
    if not subject.has_steps:
        return
    one, two = (dict(subject.detector(seed).named_parameters()) for seed in (1, 2))
    for name, value in one.items():
        if value.requires_grad and value.ndim > 1:
            require(not torch.equal(value, two[name]), f"{name} is the same for two seeds")


def frozen_weights_do_not_move(subject: Subject, folder: Path) -> None:
    """Frozen parameters refuse gradients and are after training what they were; all others have moved."""
    detector, after = subject.detector(), subject.trained().state_dict()
    named = dict(detector.named_parameters())
    frozen = {name for name, value in named.items() if not value.requires_grad}
    require(bool(frozen) == detector.frozen or not named, f"frozen are {sorted(frozen)}")
    for name in frozen:
        require(torch.equal(after[name], named[name]), f"training moved {name}")
    if not subject.has_steps:
        return
    groups = detector.optimizer().param_groups
    optimised = {id(value) for group in groups for value in group["params"]}
    trained = {id(value) for value in detector.parameters() if value.requires_grad}
    require(optimised == trained, "the optimiser has other parameters than those that take gradients")
    detector.train()
    terms = detector.loss(labelled_batch(subject, detector, 3), seeding.generator(0))
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    for name, value in named.items():
        require((value.grad is None) == (name in frozen), f"the gradient of {name}")
        require(name in frozen or not torch.equal(after[name], value), f"training left {name} as it was")


def the_loss_falls(subject: Subject, folder: Path) -> None:
    """Steps on one batch, with the same random draw, lower its loss, and all of it stays finite."""
    if not subject.has_steps:
        refuses(ConfigError, lambda: subject.train(folder / "steps.blemish", steps=3), "steps")
        refuses(ConfigError, lambda: subject.train(folder / "steps.blemish", budget=60.0), "a budget")
        return
    detector = subject.detector()
    loss_falls(detector, labelled_batch(subject, detector, subject.config.batch_size))


def loss_falls(detector: Detector, batch: Batch) -> None:
    """Require that steps on one batch lower its loss."""
    detector.train()
    optimizer, totals = detector.optimizer(), []
    detector.prepare([batch.encoded])
    for _ in range(2 + detector.config.batch_size):
        terms = detector.loss(batch, seeding.generator(0))
        total = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        totals.append(float(total.detach()))
    require(bool(np.isfinite(totals).all()), f"losses {totals}")
    require(totals[-1] < totals[0], f"losses {totals}")


def refuses(kind: type[BlemishError], act: Callable[[], object], what: str) -> str:
    """Require that something raises an error of a kind; return its sentence."""
    try:
        act()
    except kind as error:
        return str(error)
    raise AssertionError(f"the method did not refuse {what}")


Check = Callable[[Subject, Path], None]
CHECKS: dict[str, Check] = {
    check.__name__.replace("_", " "): check
    for check in (
        outputs_are_finite_and_have_their_shapes,
        an_image_scores_the_same_alone_and_in_a_batch,
        scoring_changes_nothing,
        any_image_size_gets_a_map_of_its_own_size,
        a_planted_defect_outscores_good_parts,
        the_map_points_at_a_planted_defect,
        a_saved_model_scores_as_its_source,
        the_comparison_refuses_another_model,
        the_file_says_what_was_asked_for,
        an_export_agrees_with_the_model,
        an_evaluation_measures_it,
        an_interrupted_run_ends_in_the_same_bytes,
        another_seed_gives_other_weights,
        frozen_weights_do_not_move,
        the_loss_falls,
    )
}
"""Every check by its name; each takes a subject and an empty folder."""
