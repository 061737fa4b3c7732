"""RiFT on one starting model: which layer, which learning rate, and what it is worth.

Purpose: rank the layers of an adversarially trained network by robust criticality, fine-tune the
least critical one (and, to compare, others) on clean data, interpolate back as far as robustness
demands, and report clean, PGD, APGD and corruption accuracy before and after.
(Zhu, Hu, Wang, Xie, Yang, 2023, arXiv 2308.02533; preset experiments/presets/rift-embedded.yaml.)

Command: ``python experiments/rift_sweep.py [--method.epochs 3 ...]``; every field of the preset is
an option, see ``--help``. On a cluster: ``ray job submit --address http://127.0.0.1:8265
--working-dir . -- python experiments/rift_sweep.py``

Time: a few minutes on two cores. Expected: see the preset's header.
"""

import sys
from pathlib import Path

# The source beside this script wins over an installed copy: a Ray job runs what it has shipped.
LIBRARY = Path(__file__).resolve().parents[1] / "library"
if LIBRARY.is_dir():
    sys.path.insert(0, str(LIBRARY))

from robustft.cli import experiment_cli  # noqa: E402  only findable from here on

if __name__ == "__main__":
    sys.exit(experiment_cli("rift-embedded", __doc__))
