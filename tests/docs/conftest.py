"""Where these tests import from: scripts are run as files, and releases are those that converting is tested with."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "convert")]
