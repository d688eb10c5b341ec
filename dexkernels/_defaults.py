"""Which backend serves an operator on which GPU. Made by scripts/pages.py from benchmarks/results/; not edited."""

# fmt: off
DEFAULTS: dict[tuple[str, str], str] = {}
"""(architecture, operator) -> backend. What is not here, and every CPU, takes "reference"."""

MEASURED: dict[tuple[str, str, str], str] = {}
"""(architecture, operator, backend) -> what was measured."""
