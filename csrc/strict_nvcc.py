"""Runs one compiler command and fails when ptxas reports spilled registers or serialised WGMMA (C7510).

ptxas calls both mere information, so that -Werror passes them. CMake prefixes every nvcc command with this script.
"""

import re
import subprocess
import sys

FAULTS = {
    r"\(C7510\)": "WGMMA is serialised (C7510)",
    r"\b[1-9]\d* bytes spill (stores|loads)": "registers are spilled",
    r"Registers are spilled": "registers are spilled",
}


def main(command: list[str]) -> int:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    found = [why for pattern, why in FAULTS.items() if re.search(pattern, done.stdout)]
    # The register counts of a build that passes are noise.
    lines = done.stdout.splitlines()
    if done.returncode == 0 and not found:
        lines = [line for line in lines if not re.match(r"ptxas info|\s+\d+ bytes stack frame", line)]
    if lines:
        print(*lines, sep="\n", file=sys.stderr)
    for why in dict.fromkeys(found):
        print(f"strict_nvcc: {why}; the build stops (see ptxas above)", file=sys.stderr)
    return done.returncode or bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
