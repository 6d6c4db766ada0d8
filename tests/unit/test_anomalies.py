"""Anomalies that SuperSimpleNet makes of good cells, the place of a cell, and what is kept of a layer."""

from typing import Any

import pytest
import torch
from torch import Tensor

import drawn
from blemish.detectors import registry
from blemish.detectors.cells import places
from blemish.detectors.registry import build, configure, own_settings, stored_config
from blemish.detectors.settings import as_json
from blemish.detectors.supersimplenet.anomalies import REACH, Remade, draw_remade
from blemish.detectors.supersimplenet.config import FROM_GOOD, SuperSimpleNetConfig
from blemish.detectors.supersimplenet.detector import SuperSimpleNet
from blemish.errors import ConfigError
from blemish.types import Batch, Supervision

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, COLUMNS = 8, 6
CELLS = ROWS * COLUMNS
LEARNED = drawn.TINY | {"upscale": False, "anomalies": "whole", "whitening": 0.1}


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(**settings: Any) -> SuperSimpleNet:
    built = build("supersimplenet", configure("supersimplenet", settings=LEARNED | settings), 0)
    assert isinstance(built, SuperSimpleNet)
    return built


def encoded(count: int = 2) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(count, ROWS, COLUMNS, 16, generator=draw(1)),
        torch.randn(count, 4, 3, 24, generator=draw(2)),
    )


def test_a_share_of_the_noise_is_replaced_by_differences_within_reach() -> None:
    noise = torch.ones(10_000, 3)
    made = draw_remade(make(differences=0.3).config, noise, 50, draw())
    assert made is not None
    moved = made.reach > 0
    assert float(moved.float().mean()) == pytest.approx(0.3, abs=0.02)
    assert float(made.reach[moved].min()) >= REACH[0]
    assert float(made.reach[moved].max()) <= REACH[1]
    assert not noise[moved].any()
    assert (noise[~moved] == 1).all()
    assert made.pairs.shape == (2, 10_000)
    assert set(made.pairs.flatten().tolist()) == set(range(50))
    assert made.strays.shape == (2, 0)


def test_without_the_settings_nothing_is_drawn() -> None:
    noise, generator = torch.ones(5, 3), draw()
    before = generator.get_state()
    assert draw_remade(make().config, noise, 50, generator) is None
    assert (noise == 1).all()
    assert torch.equal(generator.get_state(), before)


def test_remade_cells_are_what_their_features_and_places_say() -> None:
    detector = make(differences=0.5, misplaced=0.5).eval()
    parts, noisy = encoded(), torch.rand(2, ROWS, COLUMNS, generator=draw(3)) < 0.4
    count = int(noisy.sum())
    noise = detector.draw_noise(count, draw(4))
    made = draw_remade(detector.config, noise, 2 * CELLS, draw(5))
    assert made is not None
    with torch.no_grad():
        good = detector.adapted(parts).flatten(0, 2)
        where = places(ROWS, COLUMNS).flatten(0, 1).repeat(2, 1)

        def logits(features: Tensor, place: Tensor) -> Tensor:
            head = detector.segmentation
            assert head.place is not None
            found: Tensor = head(head.first(features) + head.place(place))
            return found

        at = noisy.flatten().nonzero()[:, 0]
        changed = good.clone()
        step = made.reach[:count, None] * (good[made.pairs[0, :count]] - good[made.pairs[1, :count]])
        changed[at] += noise[:count] + step
        strays = logits(good[made.strays[0]], where[made.strays[1]])
        found = detector.segment(parts, noisy, noise, made)
        torch.testing.assert_close(found, torch.cat([logits(changed, where), strays]), rtol=1e-4, atol=1e-5)
        losses = detector.losses(parts, noisy, noise, noisy, torch.ones(2), None, made)
    assert float(losses["misplaced"]) == pytest.approx(0.5 * float((0.5 - strays).relu().mean()), rel=1e-4)
    assert len(strays) == CELLS


def test_misplaced_cells_are_learned_from_when_no_cell_is_noisy() -> None:
    detector = make(misplaced=0.5)
    clean, none = torch.zeros(2, ROWS, COLUMNS, dtype=torch.bool), torch.zeros(0, 40)
    made = Remade(torch.zeros(0), torch.zeros(2, 0, dtype=torch.long), torch.arange(8).view(2, 4))
    found = detector.losses(encoded(), clean, none, clean, torch.zeros(2), None, made)
    assert float(found["misplaced"].detach()) > 0
    assert len(detector.segment(encoded(), clean, none, made)) == 2 * CELLS + 4


def halves(seed: int, *, swapped: bool = False) -> tuple[Tensor, Tensor]:
    """Draw features of 20 images that say in which half a cell lies, or in which it does not."""
    generator = draw(seed)
    parts = (
        torch.randn(20, ROWS, COLUMNS, 16, generator=generator),
        torch.randn(20, 4, 4, 24, generator=generator),
    )
    for part in parts:
        middle = part.shape[2] // 2
        part[:, :, :middle, :4] += -3.0 if swapped else 3.0
        part[:, :, middle:, :4] += 3.0 if swapped else -3.0
    return parts


@pytest.mark.parametrize("misplaced", [0.0, 0.5])
def test_what_is_good_elsewhere_is_found_if_places_are_learned(misplaced: float) -> None:
    detector = make(misplaced=misplaced, hidden_channels=64, noise_ratio=0.5)
    good = halves(1)
    detector.prepare([good])
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-2)
    batch = Batch(torch.empty(0), good, torch.zeros(20), torch.ones(20, dtype=torch.bool), None)
    generator = draw()
    for _ in range(60):
        optimizer.zero_grad()
        torch.stack(list(detector.loss(batch, generator).values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    detector.eval()
    with torch.no_grad():
        usual, other = detector.cells(halves(2)), detector.cells(halves(2, swapped=True))
    found = float((other > usual.quantile(0.9)).float().mean())
    assert found > 0.6 if misplaced else found < 0.2


def test_of_the_coarsest_layer_only_the_leading_components_are_kept() -> None:
    fine, coarse = encoded(40)
    coarse = coarse * torch.cat([torch.full((4,), 5.0), torch.full((20,), 0.1)])
    detector = make(components=4, whitening=1e-6)
    assert detector.adaptor.weight.shape == (20, 40)
    detector.prepare([(fine, coarse)])
    rows = detector.adapted((fine, coarse)).flatten(0, 2)
    torch.testing.assert_close(rows.T.cov(correction=0), torch.eye(20), rtol=0, atol=5e-3)
    weight = detector.adaptor.weight.detach()
    assert float(weight[:, 20:].abs().max()) < 0.05 * float(weight[:, 16:20].abs().max())
    whole = make(whitening=1e-6)
    whole.prepare([(fine, coarse)])
    assert whole.adaptor.weight.shape == (40, 40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"components": 4, "whitening": 0}, "components=4 with whitening=0"),
        ({"components": -1}, "components=-1 does not fit; expected at least 0"),
        ({"differences": 1.5}, "differences=1.5 does not fit; expected 0 to 1"),
        ({"misplaced": "-0.1"}, "misplaced=-0.1 does not fit; expected 0 to 1"),
        ({"differences": 0.5, "classification_head": True}, "differences=0.5 with classification_head=true"),
        (
            {
                "components": 4,
                "whitening": 1,
                "classification_head": 1,
                "adapt_classification_features": False,
            },
            "components=4 with adapt_classification_features=false",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure("supersimplenet", settings=settings)


def configured(method: str, preset: str = "default", **more: Any) -> SuperSimpleNetConfig:
    found = configure(method, preset, **more)
    assert isinstance(found, SuperSimpleNetConfig)
    return found


@pytest.mark.parametrize("method", ["supersimplenet", "simplenet"])
def test_defaults_for_good_images_give_way_to_what_is_asked_for(method: str) -> None:
    usual = configured(method)
    assert {key: getattr(usual, key) for key in FROM_GOOD} == FROM_GOOD
    other = configured(method, settings={"backbone": "resnet18"})
    assert (other.layers, other.components) == ((), 0)
    assert other.misplaced == FROM_GOOD["misplaced"]
    assert configured(method, settings={"layers": "stage3,stage5"}).components == 0
    assert configured(method, settings={"whitening": "0"}).components == 0
    assert configured(method, settings={"backbone": "efficientnet_lite2"}).layers == FROM_GOOD["layers"]
    supervisions: tuple[Supervision, ...] = ("mixed", "full")
    for supervision in supervisions:
        labelled = configured(method, supervision=supervision)
        assert (labelled.side, labelled.misplaced, labelled.components) == (256, 0, 0)
    assert configured(method, "paper").misplaced == 0


def test_a_classification_head_is_trained_as_with_labels() -> None:
    asked = configured("supersimplenet", settings={"classification_head": "true", "side": "320"})
    assert asked.classification_head
    assert (asked.side, asked.anomalies, asked.misplaced) == (320, "perlin", 0)


@pytest.mark.parametrize("method", ["supersimplenet", "simplenet"])
def test_what_an_older_model_file_lacks_is_not_taken_from_the_newer_default(method: str) -> None:
    older = {key: value for key, value in as_json(configure(method)).items() if key not in FROM_GOOD}
    found = stored_config(method, older)
    assert {key: getattr(found, key) for key in FROM_GOOD} == {
        key: getattr(registry.method(method).config, key) for key in FROM_GOOD
    }
    kept = own_settings(method, "default", "none", older)
    assert {"misplaced", "components", "whitening"} <= set(kept)
    assert kept["misplaced"] == 0
