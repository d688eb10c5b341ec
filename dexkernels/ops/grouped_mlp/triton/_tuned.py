"""What scripts/tune.py measured to be faster than the tables of the launchers. Made by it; not edited."""

# fmt: off
TILES: dict[tuple[str, str, int, str], tuple] = {}
"""(kernel, precision, architecture, class of shapes) -> tile."""

PATHS: dict[tuple[int, str, str], str] = {}
"""(architecture, precision, class of shapes) -> path of `grouped_mlp`."""
