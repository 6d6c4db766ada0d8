"""The output of the frozen network for an image is computed once, and is the same wherever it is kept."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import drawn
from blemish import images
from blemish.data.loading.cache import Encoded, FeatureCache, Memory
from blemish.data.loading.stores import EncodedStore, ImageStore
from blemish.detectors.supersimplenet.detector import SuperSimpleNet
from blemish.errors import OutputError, StoppedError
from blemish.images import Preprocessing
from blemish.progress import Event
from blemish.training import run

pytestmark = pytest.mark.usefixtures("one_thread")

ONE = 2 * (16 * 24 + 3 * 8 * 12)
"""Bytes of an entry: what `Encoder` returns for 16 x 24 pixels, in half precision."""
EVERYTHING = [(index, flip) for index in range(5) for flip in range(4)]


class Encoder:
    """A frozen network that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, batch: Tensor) -> Encoded:
        self.calls += 1
        return batch.mean(1, keepdim=True) / 3, batch[:, :, ::2, ::2].square()


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    """Render five images and keep them in memory, apart from the cache's own budget."""
    paths = [tmp_path / f"images/{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        images.write_png(path, drawn.part(number, (16, 24)))
    return ImageStore(paths, Preprocessing((16, 24), 65535.0), Memory(1 << 30)).fill()


def opened(store: ImageStore, cache: FeatureCache) -> tuple[EncodedStore, Encoder]:
    encoder = Encoder()
    return EncodedStore(encoder, store, cache, "cpu"), encoder


def name_of(store: ImageStore, index: int, flip: int, folder: Path) -> str:
    """Return the name of an entry's file, by writing it alone into a folder."""
    opened(store, FeatureCache(Memory(0), folder))[0].batch([(index, flip)])
    (name,) = names(folder)
    return name


def expected(store: ImageStore) -> tuple[Tensor, ...]:
    """Encode every image in all four positions without any cache."""
    dims: tuple[list[int], ...] = ([], [3], [2], [2, 3])
    whole = [store.batch([index]).flip(dims[flip]) for index, flip in EVERYTHING]
    columns = zip(*(Encoder()(one) for one in whole), strict=True)
    return tuple(torch.cat(column).half().float() for column in columns)


def entry(number: int, size: int = 10) -> Encoded:
    return torch.full((size,), float(number)).half(), torch.arange(3).half() + number


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def same(one: Encoded | None, other: Encoded) -> bool:
    return one is not None and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- entries ---


def test_memory_is_filled_first_and_the_disk_takes_the_rest(tmp_path: Path) -> None:
    size = 2 * 13
    cache = FeatureCache(Memory(2 * size + 5), tmp_path / "c")
    for number in range(5):
        cache.put(str(number), entry(number))
    assert set(cache.kept) == {"0", "1"}
    assert names(tmp_path / "c") == {"2", "3", "4"}
    assert (cache.bytes_in_memory, cache.bytes_on_disk) == (2 * size, 3 * size)
    assert all(same(cache.get(str(number)), entry(number)) for number in range(5))
    assert cache.get("5") is None
    assert set(cache.kept) == {"0", "1"}


def test_without_a_folder_what_does_not_fit_is_not_kept() -> None:
    cache = FeatureCache(Memory(26))
    for number in range(3):
        cache.put(str(number), entry(number))
    assert same(cache.get("0"), entry(0))
    assert cache.get("1") is cache.get("2") is None
    assert cache.bytes_on_disk == 0
    cache.clear()
    assert cache.get("0") is None


def test_a_shared_cache_keeps_all_on_disk_for_those_to_come(tmp_path: Path) -> None:
    size = 2 * 13
    first = FeatureCache(Memory(2 * size), tmp_path / "c", shared=True)
    for number in range(4):
        first.put(str(number), entry(number))
    assert names(tmp_path / "c") == {"0", "1", "2", "3"}
    assert (first.bytes_in_memory, first.bytes_on_disk) == (2 * size, 4 * size)
    first.clear()
    second = FeatureCache(Memory(3 * size), tmp_path / "c", shared=True)
    assert all(same(second.get(str(number)), entry(number)) for number in range(4))
    assert set(second.kept) == {"0", "1", "2"}  # in memory from now on
    assert (second.bytes_in_memory, second.bytes_on_disk) == (3 * size, 0)


def test_a_kept_entry_is_no_view_of_something_larger() -> None:
    cache, whole = FeatureCache(Memory(1000)), torch.arange(10000).half()
    cache.put("0", (whole[:3],))
    assert cache.kept["0"][0].untyped_storage().nbytes() == 6 == cache.bytes_in_memory


def test_megabytes_are_reported(tmp_path: Path) -> None:
    cache = FeatureCache(Memory(3 << 20), tmp_path / "c")
    assert cache.describe() == "0 MiB in memory"
    for number in range(5):
        cache.put(str(number), (torch.zeros(1 << 19).half(),))
    assert cache.describe() == f"3 MiB in memory and 2 MiB in {tmp_path / 'c'}"


def test_an_own_folder_goes_with_its_parent_and_a_shared_one_stays(tmp_path: Path) -> None:
    own = FeatureCache(Memory(0), tmp_path / "m.features" / "key")
    shared = FeatureCache(Memory(0), tmp_path / "cache" / "key", shared=True)
    for cache in (own, shared):
        cache.clear()  # nothing there yet
        cache.put("0", entry(0))
        cache.clear()
    assert names(tmp_path) == {"cache"}
    assert names(tmp_path / "cache" / "key") == {"0"}


def test_what_lies_beside_the_own_folder_stays(tmp_path: Path) -> None:
    own = FeatureCache(Memory(0), tmp_path / "m.features" / "key")
    own.put("0", entry(0))
    (tmp_path / "m.features" / "mine.txt").write_text("not yours")
    own.clear()
    assert names(tmp_path / "m.features") == {"mine.txt"}


# --- damage ---


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_computed_again(
    store: ImageStore, tmp_path: Path, keep: int, shared: bool
) -> None:
    folder = tmp_path / "c"
    encoded, encoder = opened(store, FeatureCache(Memory(0), folder, shared=shared))
    wanted = encoded.batch(EVERYTHING)
    path = folder / name_of(store, 3, 2, tmp_path / "one")
    good = path.read_bytes()
    path.write_bytes(good[:keep])
    again, encoder = opened(store, FeatureCache(Memory(0), folder, shared=shared))
    assert same(again.batch(EVERYTHING), wanted)
    assert encoder.calls == 1
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_write_that_fails_leaves_no_file(
    store: ImageStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    raised: type[BaseException],
) -> None:
    write_bytes = Path.write_bytes

    def failing(self: Path, data: bytes) -> int:
        write_bytes(self, data[: len(data) // 2])
        raise failure

    encoded, _ = opened(store, FeatureCache(Memory(0), tmp_path / "c"))
    name = name_of(store, 1, 0, tmp_path / "one")
    monkeypatch.setattr(Path, "write_bytes", failing)
    with pytest.raises(raised) as caught:
        encoded.batch([(1, 0)])
    if isinstance(failure, OSError):
        assert str(caught.value) == f"cannot write {tmp_path / 'c' / name}: {failure.strerror}"
    assert names(tmp_path / "c") == set()
    assert encoded.cache.bytes_on_disk == 0


def test_what_a_killed_run_was_writing_is_not_read(store: ImageStore, tmp_path: Path) -> None:
    encoded, _ = opened(store, FeatureCache(Memory(0), tmp_path / "c"))
    wanted = encoded.batch([(1, 0)])
    (path,) = (tmp_path / "c").iterdir()
    path.rename(path.with_name(f".{path.name}.1a2b3c4d"))
    again, encoder = opened(store, FeatureCache(Memory(0), tmp_path / "c"))
    assert same(again.batch([(1, 0)]), wanted)
    assert encoder.calls == 1


# --- stores ---


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("budget", [0, ONE, 7 * ONE + 1, 1 << 30])
def test_wherever_entries_are_kept_they_are_the_same(
    store: ImageStore, tmp_path: Path, budget: int, on_disk: bool, shared: bool
) -> None:
    cache = FeatureCache(Memory(budget), tmp_path / "c" if on_disk else None, shared=shared)
    encoded, encoder = opened(store, cache)
    wanted = expected(store)
    for _ in range(2):
        assert same(encoded.batch(EVERYTHING), wanted)
        mixed = [(4, 1), (0, 0), (4, 1), (2, 3)]
        rows = [EVERYTHING.index(one) for one in mixed]
        assert same(encoded.batch(mixed), tuple(part[rows] for part in wanted))
    kept = min(len(EVERYTHING), budget // ONE)
    assert len(cache.kept) == kept
    assert cache.bytes_in_memory == kept * ONE
    assert cache.bytes_on_disk == (on_disk * ONE * (len(EVERYTHING) if shared else len(EVERYTHING) - kept))
    if on_disk:
        assert encoder.calls == len(EVERYTHING)
    columns = zip(*encoded.entries(), strict=True)  # unflipped, in order
    assert same(tuple(torch.cat(column) for column in columns), tuple(part[::4] for part in wanted))


def test_a_second_run_on_a_shared_folder_encodes_nothing(store: ImageStore, tmp_path: Path) -> None:
    first, encoder = opened(store, FeatureCache(Memory(ONE), tmp_path / "c", shared=True))
    wanted = first.batch(EVERYTHING)
    assert encoder.calls == len(EVERYTHING)
    second, encoder = opened(store, FeatureCache(Memory(ONE), tmp_path / "c", shared=True))
    assert same(second.batch(EVERYTHING), wanted)
    assert encoder.calls == 0


def test_an_entry_goes_by_what_the_image_holds(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "copy.png").write_bytes(store.paths[2].read_bytes())
    copies = ImageStore([tmp_path / "copy.png", store.paths[2]], Preprocessing((16, 24), 65535.0), Memory(0))
    encoded, encoder = opened(copies, FeatureCache(Memory(1 << 30)))
    encoded.batch([(0, 1), (1, 1), (0, 1)])
    assert encoder.calls == 1
    encoded.batch([(0, flip) for flip in range(4)])
    assert encoder.calls == 4


def test_without_a_frozen_part_there_is_nothing_to_keep(store: ImageStore, tmp_path: Path) -> None:
    cache = FeatureCache(Memory(0), tmp_path / "c")
    encoded = EncodedStore(None, store, cache, "cpu")
    assert encoded.batch(EVERYTHING) == ()
    assert list(encoded.entries()) == [()] * 5
    assert names(tmp_path / "c") == set()


# --- runs ---


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Runs":
    """Return trainings that end before the export, and count what they encode."""
    found = Runs(tmp_path)
    encode = SuperSimpleNet.encode

    def counted(self: SuperSimpleNet, batch: Tensor) -> Encoded:
        found.calls += 1
        return encode(self, batch)

    def keep(path: Path, detector: torch.nn.Module, *arguments: Any) -> None:
        found.states.append({key: value.clone() for key, value in detector.state_dict().items()})

    monkeypatch.setattr(SuperSimpleNet, "encode", counted)
    monkeypatch.setattr(run, "finalise", keep)
    return found


SMALL = drawn.TINY | {"layers": ("stage2",), "classification_head": False}


class Runs:
    """Short trainings on three defects and seven good images: at most 19 entries."""

    def __init__(self, folder: Path) -> None:
        self.data = drawn.data_set(folder / "parts", bad=0, train_bad=3)
        self.weights = drawn.tiny_weights(folder / "weights.safetensors")
        self.out = folder / "out" / "m.blemish"
        self.calls = 0
        self.states: list[dict[str, Tensor]] = []
        self.messages: list[str] = []

    def report(self, event: Event) -> None:
        self.messages.append(event.message)

    def encoded(self, steps: int = 3, **changes: Any) -> int:
        """Train; return how many images were encoded, except the one that tries the settings out."""
        self.calls = 0
        given: dict[str, Any] = {
            "settings": SMALL,
            "weights": self.weights,
            "memory": 0,
            "report": self.report,
        }
        run.train(
            self.data,
            model="supersimplenet",
            out=self.out,
            steps=steps,
            precision="fp32",
            device="cpu",
            **given | changes,
        )
        return self.calls - 1

    def all_equal(self) -> bool:
        first = self.states[0]
        return all(torch.equal(value, other[key]) for other in self.states for key, value in first.items())


ENTRIES = 7 + 4 * 3


def test_no_way_to_keep_features_changes_a_run(runs: Runs, tmp_path: Path) -> None:
    assert runs.encoded(memory=1 << 30) == ENTRIES
    assert runs.encoded() == ENTRIES  # all in files
    assert runs.encoded(cache="off", memory=1 << 30) == ENTRIES + 8 * 3  # and again in every step
    assert names(runs.out.parent) == set()  # nothing was left, nor ever there
    assert runs.encoded(cache=tmp_path / "cache") == ENTRIES
    assert runs.encoded(cache=tmp_path / "cache", memory=3 << 10) == 0
    assert runs.all_equal()
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(names(folder)) == ENTRIES


def test_entries_of_another_making_are_not_read(runs: Runs, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    other = drawn.tiny_weights(tmp_path / "other.safetensors", seed=1)
    runs.encoded(cache=cache)
    for changes in (
        {"settings": SMALL | {"image_size": (64, 96)}},
        {"settings": SMALL | {"layers": ("stage1",)}},
        {"weights": other},
    ):
        assert runs.encoded(cache=cache, steps=1, **changes) == ENTRIES, changes
    assert len(names(cache)) == 4
    # What comes behind the frozen part, or is drawn, makes no other entry.
    trained = {"hidden_channels": 8, "noise": 0.5, "batch_size": 3, "perlin_threshold": 0.3}
    assert runs.encoded(cache=cache, steps=1, settings=SMALL | trained, seed=3) == 0
    assert runs.encoded(cache=cache, steps=1, supervision="none") == 0


def test_an_image_that_changed_is_encoded_anew(runs: Runs, tmp_path: Path) -> None:
    runs.encoded(cache=tmp_path / "cache")
    (path, *_) = sorted((runs.data / "train" / drawn.KIND).iterdir())
    images.write_png(path, drawn.spotted(777)[0])
    assert runs.encoded(cache=tmp_path / "cache") == 4  # flips
    assert not runs.all_equal()


def test_a_run_that_was_stopped_finds_its_features_again(runs: Runs) -> None:
    with pytest.raises(StoppedError, match="stopped after step 2 of 3"):
        runs.encoded(**drawn.stop_after(2, runs.report))
    assert names(runs.out.parent) == {"m.blemish.checkpoint", "m.blemish.features"}
    assert runs.encoded(resume=True) == 0
    assert names(runs.out.parent) == set()
    runs.encoded()
    assert runs.all_equal()


def test_how_much_is_kept_is_reported(runs: Runs, tmp_path: Path) -> None:
    settings = SMALL | {"image_size": (192, 192), "batch_size": 1}
    runs.encoded(memory=1 << 30, steps=1, settings=settings)
    assert round(ENTRIES * 2 * 24 * 48 * 48 / 2**20) == 2  # 24 channels, two bytes each, at a quarter
    assert "feature cache: 2 MiB in memory" in runs.messages
    runs.encoded(cache=tmp_path / "cache", steps=1, settings=settings)
    (folder,) = (tmp_path / "cache").iterdir()
    assert f"feature cache: 0 MiB in memory and 2 MiB in {folder}" in runs.messages


def test_a_folder_may_be_called_as_a_choice_is(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs.encoded(cache=Path("off"), steps=1)
    (folder,) = (tmp_path / "off").iterdir()
    assert len(names(folder)) == ENTRIES


def test_a_file_in_the_folders_place_is_refused(runs: Runs) -> None:
    with pytest.raises(OutputError, match=r"is a file; expected a folder"):
        runs.encoded(cache=runs.weights)
    assert runs.states == []
