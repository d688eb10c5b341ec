"""What benchmarks measured of every backend, by GPU. Made by scripts/pages.py from benchmarks/results/; not edited."""

# fmt: off
MEASURED: dict[tuple[str, str, str], str] = {}
"""(architecture, operator, backend) -> what was measured."""
