"""Rows of scripts/faults are imported as `scripts/reliability.py` imports them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
