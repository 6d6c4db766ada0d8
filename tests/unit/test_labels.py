"""Labelled defects on their way into training: which, with which masks, in which turn."""

import dataclasses
import itertools
import math
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import blemish
import drawn
from blemish import images
from blemish.data.labels import amount, choose_defects, describe, keep_masks, recognise, supervise
from blemish.data.layouts import scan
from blemish.data.loading.batches import Batches
from blemish.data.loading.cache import FeatureCache, Memory
from blemish.data.loading.masks import Mask, distance_weights, read_masks
from blemish.data.loading.sampling import epoch_entries, epoch_length, fewest_turns, flipped
from blemish.data.loading.stores import EncodedStore, ImageStore
from blemish.data.split import Split, split
from blemish.errors import BlemishError, ConfigError, DataError
from blemish.evaluation.run import evaluate
from blemish.files import short_digest
from blemish.images import Preprocessing
from blemish.progress import Event, silent
from blemish.training import fingerprint, material
from blemish.training.plan import Plan, plan
from blemish.training.request import TrainingRequest
from blemish.types import AnyArray, BoolArray, FloatArray, LabelRules, Sample, Supervision

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path("/data")


# --- sampling ---


def labelled(good: int, defective: int) -> list[int]:
    """Return labels of good and defective samples in mixed order."""
    labels = [0] * good + [1] * defective
    random.Random(0).shuffle(labels)
    return labels


@pytest.mark.parametrize("flips", [1, 4])
@pytest.mark.parametrize(("good", "defective"), [(10, 3), (50, 1), (2, 7), (9, 9)])
def test_an_epoch_has_every_defect_with_its_flips_and_as_many_good_turns(
    good: int, defective: int, flips: int
) -> None:
    labels = labelled(good, defective)
    assert epoch_length(labels, flips) == 2 * flips * defective
    for epoch in range(5):
        entries = epoch_entries(labels, 3, epoch, flips)
        bad = [entry for entry in entries if labels[entry[0]] == 1]
        assert sorted(bad) == [(i, f) for i, label in enumerate(labels) if label for f in range(flips)]
        assert len(entries) - len(bad) == flips * defective
        assert {flip for index, flip in entries if labels[index] == 0} == {0}


@pytest.mark.parametrize(("good", "defective"), [(10, 3), (50, 1), (2, 7), (7, 2)])
def test_no_good_image_gets_ahead_by_more_than_a_turn(good: int, defective: int) -> None:
    labels, turns = labelled(good, defective), Counter[int]()
    for epoch in range(30):
        turns.update(index for index, _ in epoch_entries(labels, 0, epoch) if labels[index] == 0)
        counts = [turns[index] for index, label in enumerate(labels) if label == 0]
        assert max(counts) - min(counts) <= 1
    assert sum(turns.values()) == 30 * 4 * defective


def test_half_of_a_batch_is_defective_on_average() -> None:
    labels = labelled(20, 4)
    places = np.array([[labels[i] for i, _ in epoch_entries(labels, 1, epoch)] for epoch in range(300)])
    assert places.shape == (300, 32)
    # No place of the epoch prefers either: 0.5 +- 5 standard deviations of 300 coins.
    assert np.abs(places.mean(0) - 0.5).max() < 5 * 0.5 / math.sqrt(300)


def test_an_epoch_depends_on_the_seed_and_its_number_alone() -> None:
    labels = labelled(10, 3)
    forwards = [epoch_entries(labels, 5, epoch) for epoch in range(6)]
    torch.manual_seed(99)
    backwards = [epoch_entries(labels, 5, epoch) for epoch in reversed(range(6))]
    assert forwards == backwards[::-1]
    assert len({tuple(entries) for entries in forwards}) == 6
    assert epoch_entries(labels, 6, 0) != forwards[0]


@pytest.mark.parametrize("flips", [1, 4])
def test_without_defects_every_image_has_one_turn(flips: int) -> None:
    assert epoch_length([0] * 7, flips) == 7
    epochs = [epoch_entries([0] * 7, 0, epoch, flips) for epoch in range(6)]
    assert all(sorted(entries) == [(index, 0) for index in range(7)] for entries in epochs)
    assert len({tuple(entries) for entries in epochs}) > 4


def test_turns_come_in_rounds_wherever_they_start() -> None:
    whole = fewest_turns(5, 2, 0, 40)
    assert all(sorted(whole[start : start + 5]) == list(range(5)) for start in range(0, 40, 5))
    for start, count in ((0, 3), (3, 9), (7, 1), (5, 5), (12, 20), (4, 0)):
        assert fewest_turns(5, 2, start, count) == whole[start : start + count]


@pytest.mark.parametrize("shape", [(3, 4), (1, 3, 5, 4)])
def test_flips_are_those_of_numpy(shape: tuple[int, ...]) -> None:
    array = np.arange(math.prod(shape)).reshape(shape)
    across, down = np.flip(array, -1), np.flip(array, -2)
    for flip, wanted in enumerate((array, across, down, np.rot90(array, 2, (-2, -1)))):
        assert np.array_equal(flipped(array, flip), wanted)
        assert flipped(array, flip).flags.c_contiguous


# --- amounts ---


@pytest.mark.parametrize(
    ("text", "of", "count"),
    [
        ("10", 12, 10),
        (7, 7, 7),
        ("0", 5, 0),
        ("1", 5, 1),
        ("0.5", 12, 6),
        (0.5, 12, 6),
        (".25", 12, 3),
        ("50%", 12, 6),
        ("12.5%", 16, 2),
        ("100%", 9, 9),
        ("1.0", 9, 9),
        ("1%", 9, 1),  # a share is never rounded to nothing
        ("0%", 9, 0),
        (" 3 ", 9, 3),
    ],
)
def test_amounts(text: str | float, of: int, count: int) -> None:
    assert amount(text, of, "train defects") == count


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected a number of images, or a share"),
        ("half", "expected a number of images, or a share"),
        ("-1", "expected a number of images, or a share"),
        ("1e1", "expected a number of images, or a share"),
        ("5 of 9", "expected a number of images, or a share"),
        ("nan", "expected a number of images, or a share"),
        ("%", "expected a number of images, or a share"),
        ("1.5", "expected a share of at most 1"),
        ("101%", "expected a share of at most 1"),
        ("10", "only 9 are available"),
    ],
)
def test_other_amounts_are_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        amount(text, 9, "train defects")
    assert f"train defects {text}" in str(raised.value)


# --- which defects train ---


def sample(name: str, *, masked: bool = True) -> Sample:
    masks = (ROOT / "ground_truth" / name,) if masked and "good" not in name else ()
    return Sample(ROOT / name, int("good" not in name), name.split("/")[1], "test", masks)


def parts(*, waiting: int = 8, training: int = 0, masked: int | None = None) -> Split:
    """Split four good images and some defects, of which so many for training are masked."""
    good = [sample(f"train/good/{number}.png") for number in range(4)]
    test = [sample(f"test/{kind}/{n}.png") for kind in ("dent", "hole") for n in range(waiting // 2)]
    test += [sample(f"test/good/{number}.png") for number in range(2)]
    known = training if masked is None else masked
    defects = [sample(f"train/dent/{number}.png", masked=number < known) for number in range(training)]
    return Split(tuple(good[:2]), tuple(good[2:]), tuple(test), tuple(defects))


def test_without_an_amount_the_data_sets_own_split_holds() -> None:
    for given in (parts(), parts(training=3)):
        assert choose_defects(given, ROOT, None, 0) is given
        assert keep_masks(given, ROOT, None, 0) is given


def test_drawn_defects_leave_the_test_set() -> None:
    given = parts()
    found = choose_defects(given, ROOT, "3", 0)
    assert len(found.train_defects) == 3
    assert all(one.label == 1 and one.masks for one in found.train_defects)
    assert not set(found.train_defects) & set(found.test)
    assert set(found.train_defects) | set(found.test) == set(given.test)
    assert (found.train, found.held_out) == (given.train, given.held_out)


def test_defects_for_training_are_drawn_from_those_where_there_are_any() -> None:
    given = parts(training=5)
    found = choose_defects(given, ROOT, "40%", 0)
    assert len(found.train_defects) == 2
    assert set(found.train_defects) < set(given.train_defects)
    assert found.test == given.test
    with pytest.raises(ConfigError, match="train defects 6: only 5 are available"):
        choose_defects(given, ROOT, "6", 0)


def test_draws_are_nested_and_follow_the_seed() -> None:
    given = parts(waiting=12)
    drawn_ = [set(choose_defects(given, ROOT, count, 0).train_defects) for count in range(13)]
    assert [len(each) for each in drawn_] == list(range(13))
    assert all(smaller < larger for smaller, larger in itertools.pairwise(drawn_))
    shuffled = dataclasses.replace(given, test=tuple(reversed(given.test)))
    assert (
        choose_defects(shuffled, ROOT, 5, 0).train_defects == choose_defects(given, ROOT, 5, 0).train_defects
    )
    others = {choose_defects(given, ROOT, 5, seed).train_defects for seed in range(5)}
    assert len(others) > 2


def test_masks_are_kept_for_so_many() -> None:
    given = parts(training=6, masked=5)
    kept = [keep_masks(given, ROOT, count, 0).train_defects for count in range(6)]
    for count, defects in enumerate(kept):
        assert [one.path for one in defects] == [one.path for one in given.train_defects]
        assert sum(bool(one.masks) for one in defects) == count
    named = [{one.path for one in defects if one.masks} for defects in kept]
    assert all(smaller < larger for smaller, larger in itertools.pairwise(named))
    assert given.train_defects[5].path not in named[5]
    with pytest.raises(ConfigError, match="train masks 6: only 5"):
        keep_masks(given, ROOT, "6", 0)


# --- what is learned of them ---

ALL: tuple[Supervision, ...] = ("none", "weak", "mixed", "full")
WITHOUT_WEAK: tuple[Supervision, ...] = ("none", "mixed", "full")
STATES = {"none": (0, 0), "weak": (4, 0), "mixed": (4, 1), "full": (4, 4)}
"""Defects for training, and masks among them."""


def sentence(given: Split, able: Sequence[Supervision] = ALL, model: str = "m") -> str:
    """Return what a user is told of a split under supervision auto."""
    found, supervision, unused = supervise(given, "auto", able, model)
    return describe(found, supervision) + unused


@pytest.mark.parametrize("state", STATES)
def test_supervision_is_recognised(state: str) -> None:
    training_, masked = STATES[state]
    given = parts(training=training_, masked=masked)
    assert recognise(given.train_defects) == state
    assert supervise(given, "auto", ALL, "m") == (given, state, "")
    assert sentence(given).startswith(f"supervision {state}: 2 good ")


@pytest.mark.parametrize("asked", ALL)
@pytest.mark.parametrize("state", STATES)
def test_supervision_that_is_asked_for_holds_or_is_refused(state: str, asked: Supervision) -> None:
    training_, masked = STATES[state]
    given = parts(training=training_, masked=masked)
    wants = {"none": "", "weak": "at least one", "mixed": "some with masks and some without"}
    if asked == state or asked == "none" or (asked == "weak" and training_):
        found, supervision, unused = supervise(given, asked, ALL, "m")
        assert supervision == recognise(found.train_defects) == asked
        assert unused == ""
        assert (found.train, found.test) == (given.train, given.test)
        if asked != "none":
            assert [one.path for one in found.train_defects] == [one.path for one in given.train_defects]
        assert describe(found, supervision).startswith(f"supervision {asked}: 2 good ")
        return
    says = f"found {training_} defective training images, {masked} of them with masks; supervision {asked}"
    with pytest.raises(DataError, match=says) as raised:
        supervise(given, asked, ALL, "m")
    assert wants.get(asked, "masks for all") in str(raised.value)


def test_what_is_learned_from_is_said() -> None:
    assert sentence(parts(training=4, masked=1)) == (
        "supervision mixed: 2 good and 4 defective training images, 1 with masks"
    )
    assert sentence(parts(waiting=0)) == "supervision none: 2 good training images"
    assert sentence(parts(waiting=8)) == (
        "supervision none: 2 good training images "
        "(8 defective images are used for testing; --train-defects moves some to training)"
    )


def test_a_word_that_is_no_supervision_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="unknown supervision 'half'; expected auto, none, weak, mixed, full"
    ):
        supervise(parts(), "half", ALL, "m")


def test_what_a_model_cannot_learn_from_is_refused_or_under_auto_left_out() -> None:
    unmasked, masked = parts(training=3, masked=0), parts(training=3)
    with pytest.raises(ConfigError, match="simplenet supports supervision none or mixed or full, not weak"):
        supervise(unmasked, "weak", WITHOUT_WEAK, "simplenet")
    found, supervision, _ = supervise(unmasked, "auto", WITHOUT_WEAK, "simplenet")
    assert (supervision, found.train_defects) == ("none", ())
    said = sentence(unmasked, WITHOUT_WEAK, "simplenet")
    assert said.endswith("; simplenet cannot use the 3 defective images")
    assert supervise(masked, "auto", WITHOUT_WEAK, "simplenet")[1] == "full"
    for asked in ("weak", "mixed", "full"):
        with pytest.raises(ConfigError, match=f"efficientad-s supports supervision none, not {asked}"):
            supervise(masked, asked, ("none",), "efficientad-s")
    found, supervision, _ = supervise(masked, "auto", ("none",), "efficientad-s")
    assert (supervision, found.train_defects) == ("none", ())
    said = sentence(masked, ("none",), "efficientad-s")
    assert said.endswith("; efficientad-s cannot use the 3 defective images")


# --- masks ---


def write(
    folder: Path, mask: AnyArray | None, number: int = 0, size: tuple[int, int] | None = None
) -> Sample:
    """Write a part, with or without a mask, as a defective sample."""
    path = folder / f"{number}.png"
    masks: tuple[Path, ...] = ()
    images.write_png(path, drawn.part(number, size or (mask.shape if mask is not None else (64, 64))))
    if mask is not None:
        images.write_png(folder / f"{number}_mask.png", (255 * mask).astype(np.uint8))
        masks = (folder / f"{number}_mask.png",)
    return Sample(path, 1, "spot", masks=masks)


def random_mask(seed: int, size: tuple[int, int], share: float) -> BoolArray:
    return np.random.default_rng(seed).random(size) < share


def dilated(mask: BoolArray, side: int) -> BoolArray:
    """Mark every pixel that has a marked one in the square around it."""
    found = np.zeros_like(mask)
    for y, x in np.argwhere(mask):
        found[max(0, y - side // 2) : y + side // 2 + 1, max(0, x - side // 2) : x + side // 2 + 1] = True
    return found


def one_mask(folder: Path, mask: AnyArray, size: tuple[int, int], **rules: Any) -> Mask:
    return read_masks([write(folder, mask)], size, LabelRules(**rules))[0]


@pytest.mark.parametrize("side", [0, 1, 3, 7])
def test_masks_are_widened_by_a_square(tmp_path: Path, side: int) -> None:
    mask = random_mask(1, (30, 40), 0.02)
    mask[0, 0] = mask[29, 39] = True
    found = one_mask(tmp_path, mask, (30, 40), dilation=side)
    assert np.array_equal(found.defective, dilated(mask, side) if side else mask)
    assert found.weights is None


def regions(mask: BoolArray) -> list[list[tuple[int, int]]]:
    """List the 8-connected regions of a mask by flooding."""
    left, found = {(int(y), int(x)) for y, x in np.argwhere(mask)}, []
    while left:
        front, region = [left.pop()], []
        while front:
            y, x = front.pop()
            region.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            front += near
        found.append(region)
    return found


def weights_by_hand(mask: BoolArray) -> FloatArray:
    """Weight by the distance to the nearest pixel that is not defective, over its largest in the region."""
    outside = np.argwhere(~mask)
    found = np.zeros(mask.shape)
    for region in regions(mask):
        distances = [np.sqrt(((outside - pixel) ** 2).sum(1)).min() for pixel in region]
        for pixel, distance in zip(region, distances, strict=True):
            found[pixel] = 3 * (distance / max(distances)) ** 2
    return found.astype(np.float32)


def joined_by_a_corner() -> BoolArray:
    """Draw two squares of different sides that touch at a corner, and a lone bar."""
    mask = np.zeros((16, 18), np.bool_)
    mask[1:4, 1:4] = mask[4:9, 4:9] = True
    mask[12:14, 2:14] = True
    return mask


@pytest.mark.parametrize(
    "mask", [joined_by_a_corner(), random_mask(2, (17, 23), 0.7), random_mask(3, (9, 31), 0.2)]
)
def test_weights_grow_with_the_distance_to_the_border(mask: BoolArray) -> None:
    found = distance_weights(mask)
    np.testing.assert_allclose(found, weights_by_hand(mask), rtol=1e-5, atol=1e-6)
    assert found.dtype == np.float32
    for region in regions(mask):  # each has its own maximum; what touches at a corner is one
        assert max(found[pixel] for pixel in region) == pytest.approx(3)


def test_a_region_that_fills_the_image_weighs_alike() -> None:
    assert np.array_equal(distance_weights(np.ones((5, 7), np.bool_)), np.full((5, 7), 3, np.float32))


def test_weights_are_those_of_the_widened_mask(tmp_path: Path) -> None:
    mask = random_mask(4, (30, 40), 0.005)
    found = one_mask(tmp_path, mask, (30, 40), dilation=5, weighted=True)
    assert found.weights is not None
    np.testing.assert_allclose(found.weights, weights_by_hand(dilated(mask, 5)), rtol=1e-5, atol=1e-6)


def test_a_pixel_is_defective_from_half_of_its_area_up(tmp_path: Path) -> None:
    mask = np.zeros((64, 96), np.bool_)
    mask[16:40, 32:80] = True
    found = one_mask(tmp_path, mask, (32, 48), weighted=True)
    assert np.array_equal(found.defective, mask[::2, ::2])
    assert found.weights is not None  # weighted first, resized then
    np.testing.assert_allclose(found.weights, images.resize_map(weights_by_hand(mask), (32, 48)), rtol=1e-5)


def test_a_tiny_mask_survives_the_resize(tmp_path: Path) -> None:
    mask = np.zeros((300, 400), np.bool_)
    mask[150, 222] = True
    found = one_mask(tmp_path, mask, (32, 48)).defective
    assert found.any()
    # The pixels that the filter of the resize, a triangle two pixels wide, lets it touch.
    marked = np.argwhere(found)
    assert np.abs(marked + 0.5 - [150.5 * 32 / 300, 222.5 * 48 / 400]).max() < 1
    assert found[150 * 32 // 300, 222 * 48 // 400]


def test_an_empty_mask_counts_as_none_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spot = drawn.spotted(1)[1]
    samples = [Sample(tmp_path / "none.png", 0, "good"), write(tmp_path, spot, 1), write(tmp_path, None, 2)]
    assert list(read_masks(samples, (64, 64), LabelRules())) == [1]
    assert caplog.messages == []
    samples += [write(tmp_path, np.zeros_like(spot), 3), write(tmp_path, np.zeros_like(spot), 4)]
    assert list(read_masks(samples, (64, 64), LabelRules())) == [1]
    said = "2 defective images have an empty mask and are treated as unmasked"
    assert caplog.messages == [f"{said}; the first is {tmp_path / '3.png'}"]


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    wrong = write(tmp_path, random_mask(1, (64, 60), 0.5), size=(64, 64))
    with pytest.raises(DataError, match=r"0_mask\.png is 64 x 60 pixels .*; expected its image's 64 x 64"):
        read_masks([wrong], (32, 32), LabelRules())


def test_an_unreadable_mask_is_refused(tmp_path: Path) -> None:
    broken = write(tmp_path, random_mask(1, (64, 64), 0.5))
    broken.masks[0].write_bytes(broken.masks[0].read_bytes()[:80])
    with pytest.raises(BlemishError, match=r"0_mask\.png"):
        read_masks([broken], (32, 32), LabelRules())


# --- batches ---


def planted(folder: Path, *, defects: int = 2, unmasked: int = 1, weighted: bool = False) -> Batches:
    """Draw white corners on black, each in its own place and alike nowhere when flipped, and batch them."""
    samples = [Sample(folder / f"good{n}.png", 0, "good") for n in range(5)]
    for number in range(5):
        images.write_png(folder / f"good{number}.png", drawn.part(number, (32, 32)) // 4)
    for number in range(defects + unmasked):
        mask = np.zeros((32, 32), np.bool_)
        mask[2 : 9 + 2 * number, 3:6] = mask[2:5, 3 : 20 - number] = True
        path = folder / f"{number}.png"
        images.write_png(path, np.repeat(255 * mask[..., None], 3, 2).astype(np.uint8))
        images.write_png(folder / f"{number}_mask.png", (255 * mask).astype(np.uint8))
        samples.append(Sample(path, 1, "L", masks=(folder / f"{number}_mask.png",) * (number < defects)))
    store = ImageStore([one.path for one in samples], Preprocessing((32, 32), 65535.0), Memory(1 << 30))
    encoded = EncodedStore(lambda x: (x,), store, FeatureCache(Memory(1 << 30)), "cpu")
    masks = read_masks(samples, (32, 32), LabelRules(weighted=weighted))
    return Batches(samples, store, encoded, batch_size=5, seed=0, with_images=False, masks=masks)


@pytest.mark.parametrize("weighted", [False, True])
def test_masks_and_weights_flip_with_their_images(tmp_path: Path, weighted: bool) -> None:
    batches = planted(tmp_path, weighted=weighted)
    assert batches.per_epoch == 5  # 24 entries: 3 defects in 4 positions, and as many good images
    shapes: Counter[tuple[int, bytes]] = Counter()
    for step in range(5):
        batch = batches.at(step)
        assert batch.masks is not None
        assert (batch.weights is not None) == weighted
        for row, (index, _) in enumerate(batches.entries(step)):
            label = batches.labels[index]
            assert float(batch.labels[row]) == label
            white: Tensor = batch.encoded[0][row, 0] > 0.5
            if index in batches.masks:
                shapes[index, white.numpy().tobytes()] += 1
                assert torch.equal(batch.masks[row] > 0, white)
                assert bool(batch.masked[row])
                if batch.weights is not None:
                    expected = weights_by_hand(white.numpy())
                    np.testing.assert_allclose(batch.weights[row].numpy(), expected, rtol=1e-5, atol=1e-6)
                continue
            assert not batch.masks[row].any()
            assert bool(batch.masked[row]) == (label == 0)  # of a good part all pixels are known
            if batch.weights is not None:
                assert bool((batch.weights[row] == 1).all())
    # Each masked defect once in each of four positions, no two of them alike.
    assert len(shapes) == 2 * 4
    assert set(shapes.values()) == {1}


def test_without_masks_a_batch_says_which_pixels_are_not_known(tmp_path: Path) -> None:
    batches = planted(tmp_path, defects=0, unmasked=2)
    for step in range(batches.per_epoch):
        batch = batches.at(step)
        assert batch.masks is None
        assert batch.weights is None
        assert torch.equal(batch.masked, batch.labels == 0)


def test_defects_are_flipped_once_where_flips_are_off(tmp_path: Path) -> None:
    batches = planted(tmp_path)
    once = Batches(
        batches.samples, batches.store, batches.encoded, batch_size=5, seed=0, masks=batches.masks, flips=1
    )
    assert once.per_epoch == 2  # 3 defects and 3 good images
    assert {flip for step in range(2) for _, flip in once.entries(step)} == {0}


# --- the test set stays one ---


def test_no_test_image_trains_and_no_training_image_is_tested(tiny: drawn.Tiny, tmp_path: Path) -> None:
    root, events = drawn.data_set(tmp_path / "parts", bad=6), list[Event]()
    model = blemish.train(
        root,
        model="supersimplenet",
        out=tmp_path / "m.blemish",
        weights=tiny.weights,
        settings=drawn.TINY | {"layers": ("stage2",)},
        train_defects="50%",
        steps=2,
        precision="fp32",
        device="cpu",
        report=events.append,
    )
    said = [event.message for event in events]
    assert "supervision full: 7 good and 3 defective training images, 3 with masks" in said
    facts = model.manifest.training
    assert (facts.good_images, facts.defective_images, facts.masked_images) == (7, 3, 3)
    assert facts.run.supervision == "full"
    trained = model.manifest.used
    assert len(trained) == 15
    bad = {path.name: short_digest(path) for path in (root / f"test/{drawn.KIND}").iterdir()}
    drawn_ = {name for name, digest in bad.items() if digest in trained}
    assert len(drawn_) == 3
    expected = choose_defects(split(scan(root), root), root, "50%", 0).train_defects
    assert {one.path.name for one in expected} == drawn_
    # What trained comes back under a third name: it is known by its content.
    copy = root / f"test/{drawn.KIND}/copy.png"
    copy.write_bytes((root / f"test/{drawn.KIND}" / min(drawn_)).read_bytes())
    found = evaluate(blemish.load(model.path), root, exhibits=0, report=events.append)
    tested = {result.path for result in found.images if result.truth == 1}
    assert tested == {f"test/{drawn.KIND}/{name}" for name in set(bad) - drawn_}
    assert (found.rows[0].good, found.rows[0].defective) == (4, 3)
    said = [event.message for event in events]
    assert "4 test images are excluded because the model was trained or calibrated on them" in said


# --- the same image twice ---


def planned(root: Path, **options: Any) -> Plan:
    """Plan a run, as far as that goes without decoding an image."""
    return plan(TrainingRequest(data=root, out=root / "m.blemish", model="supersimplenet", **options))


def test_a_copy_of_a_held_out_image_does_not_train(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = drawn.data_set(tmp_path / "parts", train_bad=2)
    for path in sorted((root / "train/good").iterdir()):
        shutil.copy(path, path.with_name(f"copy_{path.name}"))
    before = planned(root)
    found, store, held = material.read_images(before, Memory(1 << 30), silent)
    trained = {path.read_bytes() for path in store.paths}
    assert not trained & {path.read_bytes() for path in held.paths}
    assert [sample.path for sample in found.samples] == store.paths
    assert [sample.path for sample in found.parts.held_out] == held.paths
    assert found.parts.train_defects == before.parts.train_defects
    left_out = len(before.samples) - len(store.paths)
    assert left_out > 0
    assert caplog.messages == [f"{left_out} training images are copies of held-out ones and are left out"]


def test_good_images_that_are_all_copies_of_one_are_refused(tmp_path: Path) -> None:
    root = drawn.data_set(tmp_path / "parts", train_bad=1)
    files = sorted((root / "train/good").iterdir())
    for path in files[1:]:
        shutil.copy(files[0], path)
    with pytest.raises(DataError, match="all 7 good training images are copies of held-out ones"):
        material.read_images(planned(root), Memory(1 << 30), silent)


def test_masks_that_are_all_empty_leave_image_labels(tmp_path: Path) -> None:
    root = drawn.data_set(tmp_path / "parts", train_bad=2)
    for number in (100, 101):
        images.write_png(root / f"ground_truth/{drawn.KIND}/{number}_mask.png", np.zeros((64, 64), np.uint8))
    assert planned(root).supervision == "weak"
    with pytest.raises(DataError, match="0 of them with masks; supervision full expects"):
        planned(root, supervision="full")


def test_a_digest_tells_labels_and_masks_apart(tmp_path: Path) -> None:
    root = drawn.data_set(tmp_path / "parts", train_bad=2)
    samples = planned(root).samples
    other = [dataclasses.replace(samples[0], label=1), *samples[1:]]
    unmasked = [*samples[:-1], dataclasses.replace(samples[-1], masks=())]
    assert len({fingerprint.digest_samples(each) for each in (samples, other, unmasked)}) == 3
