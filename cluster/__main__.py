"""``python -m cluster`` is ``crystalformer``."""

import sys

from cluster.cli import main

sys.exit(main())
