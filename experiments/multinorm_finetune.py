"""E-AT on one starting model: from one norm to the union of three, in three epochs.

Purpose: fine-tune an Linf-robust network so that it resists the L1 and L2 balls too, drawing the
norm of each batch by robust error, and report clean, per-norm and union accuracy before and after.
(Croce, Hein, 2022, arXiv 2105.12508; preset experiments/presets/multinorm-embedded.yaml.)

Command: ``python experiments/multinorm_finetune.py [--method.scheme max ...]``; every field of the
preset is an option, see ``--help``. On a cluster: ``ray job submit --address
http://127.0.0.1:8265 --working-dir . -- python experiments/multinorm_finetune.py``

Time: about 5 minutes on two cores. Expected: see the preset's header.
"""

import sys
from pathlib import Path

# The source beside this script wins over an installed copy: a Ray job runs what it has shipped.
LIBRARY = Path(__file__).resolve().parents[1] / "library"
if LIBRARY.is_dir():
    sys.path.insert(0, str(LIBRARY))

from robustft.cli import experiment_cli  # noqa: E402  only findable from here on

if __name__ == "__main__":
    sys.exit(experiment_cli("multinorm-embedded", __doc__))
