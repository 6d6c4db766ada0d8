"""PatchCore: remember features of good images, and measure how far an image's are from the nearest of them.

Roth, Pemula, Zepeda, Schölkopf, Brox, Gehler: "Towards Total Recall in Industrial Anomaly Detection", CVPR
2022. Section 3.1 describes the features, 3.2 the choice of those that are remembered (the coreset), 3.3 the
score. Nothing is trained: the images are encoded once, and a covering subset of their cells is kept.

Departures from the paper, all undone by `--preset paper`:
- a backbone whose weights can be installed, at 384 instead of 224 pixels a side;
- the place of a cell is joined to its features, so that a good feature in a wrong place is an anomaly, too;
- features are averaged over 3 x 3 cells without the published pooling of channels, and scaled to unit length
  on average;
- the cells that are remembered are a fixed number, chosen by an exact farthest-first search;
- cells where good parts score high are levelled (`edges=cells`);
- distances are rooted, and the image score joins the largest of them with means over more cells.

In every preset, an image is judged whole: the paper's centre crop would hide defects at the border. The
paper's equation 7 is the statistic `reweighted`.
"""

from blemish.detectors.patchcore.config import PAPER, PatchCoreConfig
from blemish.detectors.patchcore.detector import PatchCore
from blemish.detectors.settings import GOOD_ONLY, Method, Preset

PATCHCORE = Method(
    PatchCore,
    PatchCoreConfig(),
    {"default": Preset({}, GOOD_ONLY), "paper": Preset(PAPER, GOOD_ONLY)},
    has_steps=False,
    leaves_one_out=True,
)
