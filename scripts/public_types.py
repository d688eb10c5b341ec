#!/usr/bin/env python3
"""Checks that every public name of both packages has a complete type, with basedpyright --verifytypes; exits 1 if not.

usage: python scripts/public_types.py

Types of other packages are ignored. Modules that need a package that is not installed, or whose results Triton has no
types for, are left out and named.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

PACKAGES = ("dexkernels", "dex")
BUILT_ON = {
    "dex.integrations": "transformers",
    "dex.inference.hub": "huggingface_hub",
}
UNTYPED = ("dexkernels.ops.grouped_mlp.triton",)
"""Modules that return objects for which Triton has no types."""


def incomplete(package: str) -> list[str]:
    """A line for each public name of ``package`` whose type is unknown or ambiguous."""
    # basedpyright resolves packages with the first python on PATH.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    command = [sys.executable, "-m", "basedpyright", "--ignoreexternal", "--outputjson", "--verifytypes", package]
    run = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    report = json.loads(run.stdout)["typeCompleteness"]
    symbols = [s for s in report["symbols"] if s["isExported"]]
    if not symbols:
        sys.exit(f"{package}: expected public names, got none from basedpyright: {run.stdout[:500]}")
    absent = (*UNTYPED, *(module for module, needed in BUILT_ON.items() if importlib.util.find_spec(needed) is None))
    bad = [s for s in symbols if not s["isTypeKnown"] or s["isTypeAmbiguous"]]
    left_out = [m for m in absent if m.startswith(f"{package}.")]
    print(f"{package}: {len(symbols)} public names" + (f"; left out: {', '.join(left_out)}" if left_out else ""))
    return [
        f"{s['name']}: {'; '.join(d['message'].splitlines()[0] for d in s['diagnostics'])}"
        for s in bad
        if not s["name"].startswith(absent)
    ]


def main() -> int:
    lines = [line for package in PACKAGES for line in incomplete(package)]
    print("\n".join(lines), end="\n" if lines else "")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
