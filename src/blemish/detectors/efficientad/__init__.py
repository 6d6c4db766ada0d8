"""EfficientAD: a student that imitates a teacher on good images, and an autoencoder for logical anomalies.

Batzner, Heckler, König: "EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies", WACV
2024. The networks follow tables 5 to 8 of its supplement, training algorithm 1 and inference algorithm 2.

Departures from the paper, each a single setting, all undone by `--preset paper`:
- 70,000 iterations at 1e-4 take days on a CPU. The default is a shorter run with Muon and a one-cycle
  schedule, on random crops of the images, in which the student learns from more of its errors (hard quantile
  0.9);
- images keep their shape, where the paper resizes them to 256 x 256;
- the image score combines the maximum of the map with its smoothed maximum and its top mean.

In either preset, the natural images of the penalty are rendered unless photographs are given. The networks
run without padding, as in the reproduction that reaches the published numbers; the final map is padded by the
4 cells that this costs on each side, where it is blind. With edges=reflect, which is not from any paper, it
covers the whole image. The teacher's outputs are stored in half precision.
"""

from blemish.detectors.efficientad.config import PAPER, EfficientADConfig
from blemish.detectors.efficientad.detector import EfficientAD
from blemish.detectors.settings import GOOD_ONLY, Method, Preset

PRESETS = {"default": Preset({}, GOOD_ONLY), "paper": Preset(PAPER, GOOD_ONLY)}
SMALL = Method(EfficientAD, EfficientADConfig(size="small"), PRESETS)
MEDIUM = Method(EfficientAD, EfficientADConfig(size="medium", steps=1000), PRESETS)
