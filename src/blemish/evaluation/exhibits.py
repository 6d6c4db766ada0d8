"""Select the images of a report: the worst mistakes, then the clearest detection of each kind of defect."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from blemish.images import overlays
from blemish.types import AnyArray, BoolArray, Exhibit, FloatArray, ImageResult, Label

Key = tuple[float, int]
"""A score and the order of arrival; lower keys come first."""

MISTAKES: tuple[tuple[str, int, Label], ...] = (
    ("Escape", 1, "ok"),
    ("False reject", 0, "defect"),
    ("Unnecessary review", 0, "review"),
)
"""Title, truth and label of each type of mistake, in the order of the report."""


@dataclass
class Shelf:
    """The images of one type with the lowest keys so far, in ascending order; at most `room` of them."""

    title: str
    room: int
    held: list[tuple[Key, Exhibit]] = field(default_factory=list)

    def takes(self, key: Key) -> bool:
        """Return whether an image with this key would be kept."""
        return len(self.held) < self.room or (self.room > 0 and key < self.held[-1][0])

    def put(self, key: Key, exhibit: Exhibit) -> None:
        """Insert an image by its key, and drop the last if there are too many."""
        insort(self.held, (key, exhibit), key=lambda pair: pair[0])
        del self.held[self.room :]


class Gallery:
    """Selects exhibits while images are being judged, so that none has to be judged twice.

    The lower its score, the worse is an escape; the higher its score, the worse is a false reject. The
    clearest detection of a kind of defect is the one with the highest score.
    """

    def __init__(self, count: int, white: float) -> None:
        """Make room for `count` images of each type of mistake and twice as many detections.

        white: white level of 16-bit images.
        """
        self.white = white
        self.offered = 0
        self.mistakes = {(truth, label): Shelf(title, count) for title, truth, label in MISTAKES}
        self.finds = Shelf("Clearest detection", 2 * count)

    def offer(
        self, result: ImageResult, image: AnyArray, anomaly_map: FloatArray, mask: BoolArray | None
    ) -> None:
        """Keep an (H, W, 3) image with its (H, W) map and mask if it ranks among the best of its type."""
        self.offered += 1
        shelf = self.mistakes.get((result.truth, result.label))
        found = result.truth == 1 and result.label != "ok"
        key = (result.score, self.offered)
        if found or result.truth == 0:
            key = (-result.score, -self.offered)
        if found:
            shelf = self.finds
            earlier = [pair for pair in shelf.held if pair[1].result.kind == result.kind]
            if earlier and earlier[0][0] < key:
                return
            shelf.held = [pair for pair in shelf.held if pair not in earlier]
        if shelf is None or not shelf.takes(key):
            return
        shown = overlays.to_display(image, self.white)
        shelf.put(key, Exhibit(shelf.title, result, shown, anomaly_map, mask))

    def exhibits(self) -> tuple[Exhibit, ...]:
        """Return the selected exhibits: mistakes first, the worst of each type first."""
        shelves = (*self.mistakes.values(), self.finds)
        return tuple(exhibit for shelf in shelves for _, exhibit in shelf.held)
