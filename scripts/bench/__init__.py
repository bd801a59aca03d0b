"""Parts of `scripts/bench_sparse.py`. They need torch alone and run from a checkout that is not installed."""

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]

try:
    import dyndet
except ModuleNotFoundError:
    sys.path.insert(0, str(ROOT / "src"))
    import dyndet

if find_spec("dyndet.kernels") is None:  # an installation maps the folder kernels/ into the package
    dyndet.__path__.append(str(ROOT))
