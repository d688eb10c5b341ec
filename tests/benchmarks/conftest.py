"""The benchmarks are imported as the package that they are."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
