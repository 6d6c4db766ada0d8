"""SuperSimpleNet: learn to tell frozen features from the same features with noise added in Perlin masks.

Rolih, Fučka, Skočaj: "SuperSimpleNet: Unifying Unsupervised and Supervised Learning for Fast and Reliable
Surface Defect Detection", ICPR 2024. Section 3.1 describes the network, 3.2 the synthetic anomalies, 3.3 the
losses.

Departures from the paper, each a single setting, all undone by `--preset paper`:
- the noise level is set from the spread of the features, since the published 0.015 suits one set of weights
  only;
- with good images only, the image score comes from the map, so that the classification head is not built (in
  the paper's ablation both detection and localisation are higher without it);
- the run is shorter, in smaller batches, with a one-cycle schedule, in bfloat16 where the processor supports
  it, and at higher learning rates with labelled defects;
- images keep their shape, where the paper resizes them to 256 x 256; from good images only they have the
  pixels of a square of 512, and the resolution of the features is not doubled.

In all presets the backbone's outputs are stored in half precision. Only `journal` adds synthetic noise to a
defect without a mask.

With labelled defects, the rules of the paper's supervised setting apply, and for defects without masks those
of its journal extension (arXiv 2408.03143 v3, 2025); REGIMES and JOURNAL list them. `simplenet.py` has the
settings of its predecessor, a reduced form of the same network.
"""

from blemish.detectors.settings import Method, Preset
from blemish.detectors.supersimplenet import config, simplenet
from blemish.detectors.supersimplenet.config import SuperSimpleNetConfig
from blemish.detectors.supersimplenet.detector import SuperSimpleNet

SUPERSIMPLENET = Method(
    SuperSimpleNet,
    SuperSimpleNetConfig(),
    {
        "default": Preset({}, config.DEFAULT_REGIMES),
        "paper": Preset(config.PAPER, config.REGIMES),
        "journal": Preset(config.JOURNAL, config.JOURNAL_REGIMES),
    },
)
SIMPLENET = Method(
    SuperSimpleNet,
    simplenet.DEFAULT,
    {
        "default": Preset({}, simplenet.DEFAULT_REGIMES),
        "paper": Preset(simplenet.PAPER, simplenet.REGIMES),
    },
)
