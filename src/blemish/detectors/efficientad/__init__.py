"""EfficientAD: a student that imitates a teacher on good images, an autoencoder for what is logically wrong.

Batzner, Heckler, König: "EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies",
WACV 2024; networks of tables 5 to 8, training of algorithm 1, inference of algorithm 2 in its supplement.

Departures from the paper, each one word in the config, all undone by `--preset paper`:
- 70,000 iterations at 1e-4 are days on a CPU: the default is a shorter run of one cycle with Muon, on random
  squares of the images, whose student learns from more of its errors (hard quantile 0.9);
- the image score joins the map's maximum with its smoothed maximum and top mean.
The penalty's natural images are drawn unless photographs are given, in either preset.
The networks run without padding, as in the reproduction that reaches the published numbers; the finished map
is padded by the 4 cells that this costs on each side, so that it is blind there. With edges=reflect, which is
no paper's, it sees to the edge. The teacher's outputs are kept in half precision.
"""

from blemish.detectors.efficientad.config import PAPER, EfficientADConfig
from blemish.detectors.efficientad.detector import EfficientAD
from blemish.detectors.settings import GOOD_ONLY, Method, Preset

PRESETS = {"default": Preset({}, GOOD_ONLY), "paper": Preset(PAPER, GOOD_ONLY)}
SMALL = Method(EfficientAD, EfficientADConfig(size="small"), PRESETS)
MEDIUM = Method(EfficientAD, EfficientADConfig(size="medium"), PRESETS)
