"""SuperSimpleNet: tell frozen features from the same features with noise under Perlin masks.

Rolih, Fučka, Skočaj: "SuperSimpleNet: Unifying Unsupervised and Supervised Learning for Fast and Reliable
Surface Defect Detection", ICPR 2024. Section 3.1 is the network, 3.2 the synthetic anomalies, 3.3 the losses.

Departures from the paper, each one word in the config, all undone by `--preset paper`:
- the noise is set by the features' own spread, for the published 0.015 belongs to one set of weights;
- trained on good images only, the image score comes from the map, so the classification head is not built
  (the paper's ablation has both detection and localisation higher without it);
- the run is shorter, in smaller batches, under a one-cycle schedule, in bfloat16 where the processor has it,
  and with labelled defects at higher rates.
In all presets the backbone's outputs are kept in half precision, and a defect without a mask gets no
synthetic noise but in `journal`.

With labelled defects the rules of the paper's supervised setting hold, and those of its journal extension for
defects without masks (arXiv 2408.03143 v3, 2025); REGIMES and JOURNAL list them. `simplenet.py` has the
numbers of its predecessor, which is the same network with less.
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
