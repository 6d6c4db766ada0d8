"""PaDiM: a Gaussian of the features of good images at each position, and the Mahalanobis distance from it.

Defard, Setkov, Loesch, Audigier: "PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and
Localization", ICPR 2021. Nothing is trained: means and covariances are measured in passes over the
features. It is at its best where parts lie exactly alike, and judges an image faster than any other method
here; with `place=all` there is one Gaussian for all positions, and no need for that.

Departures from the paper, all undone by `--preset paper`:
- a backbone whose weights can be installed;
- features averaged over 3 x 3 cells, reduced to their principal components instead of channels at random;
- covariances shrunk by as much as the number of images calls for (Ledoit and Wolf, 2004) instead of by a
  constant, which belongs to one backbone's scale;
- cells where good parts score high are levelled (`edges=cells`);
- the image score joins the map's maximum with means over more cells.

In every preset, an image is judged whole: the paper's centre crop would hide defects at the border.
"""

from blemish.detectors.padim.config import PAPER, PaDiMConfig
from blemish.detectors.padim.detector import PaDiM
from blemish.detectors.settings import GOOD_ONLY, Method, Preset

PADIM = Method(
    PaDiM,
    PaDiMConfig(),
    {"default": Preset({}, GOOD_ONLY), "paper": Preset(PAPER, GOOD_ONLY)},
    has_steps=False,
    leaves_one_out=True,
)
