"""Which test images a report shows: the worst mistakes, then the clearest find of each kind of defect."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from blemish.images import overlays
from blemish.types import AnyArray, BoolArray, Exhibit, FloatArray, ImageResult, Label

Key = tuple[float, int]
"""A score, and when its image came."""

MISTAKES: tuple[tuple[str, int, Label], ...] = (
    ("Escape", 1, "ok"),
    ("False reject", 0, "defect"),
    ("Needless review", 0, "review"),
)
"""Title, truth and label of each sort of mistake, in the order of the report."""


@dataclass
class Shelf:
    """The most remarkable images of one sort that were offered so far, the first of them first."""

    title: str
    room: int
    held: list[tuple[Key, Exhibit]] = field(default_factory=list)

    def takes(self, key: Key) -> bool:
        """Tell whether an image would be among them."""
        return len(self.held) < self.room or (self.room > 0 and key < self.held[-1][0])

    def put(self, key: Key, exhibit: Exhibit) -> None:
        """Put an image in its place; the last one makes room for it."""
        insort(self.held, (key, exhibit), key=lambda pair: pair[0])
        del self.held[self.room :]


class Gallery:
    """Chooses exhibits while images are judged, so that none is judged twice.

    An escape is the worse, the lower its score; a rejected good part, the higher its score. The clearest find
    of a kind of defect is the one of the highest score.
    """

    def __init__(self, count: int, white: float) -> None:
        """count: of each sort of mistake, and twice as many finds. white: of 16-bit images."""
        self.white = white
        self.offered = 0
        self.mistakes = {(truth, label): Shelf(title, count) for title, truth, label in MISTAKES}
        self.finds = Shelf("Best find", 2 * count)

    def offer(
        self, result: ImageResult, image: AnyArray, anomaly_map: FloatArray, mask: BoolArray | None
    ) -> None:
        """Take an image if it is among the most remarkable: (H, W, 3), its (H, W) map, and its mask."""
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
        """Return what was chosen: mistakes first, the worst of each sort first."""
        shelves = (*self.mistakes.values(), self.finds)
        return tuple(exhibit for shelf in shelves for _, exhibit in shelf.held)
