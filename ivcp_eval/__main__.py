"""``python -m ivcp_eval`` is ``ivcp``."""

from __future__ import annotations

import sys

from ivcp_eval.cli import main

sys.exit(main())
