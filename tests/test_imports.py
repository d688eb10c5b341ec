"""What an import loads: the kernel library alone, and the model without data readers or the command line."""

import subprocess
import sys

import pytest

IMAGING = {"PIL", "matplotlib", "nibabel", "pydicom", "pylibjpeg", "SimpleITK", "cv2", "monai"}
PROGRAMS = {f"dex.{name}" for name in ("data", "prepare", "sizing", "analysis", "train", "inference", "report", "cli")}
"""What stands above the model."""


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules, sep='\\n')"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(process.stdout.split())


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("dexkernels", IMAGING | {"dex", "triton", "torch._dynamo", "yaml", "safetensors", "tensorboard"}),
        ("dexkernels.testing", IMAGING | {"dex", "triton", "pytest", "hypothesis"}),
        ("dex.model", IMAGING | PROGRAMS | {"torch._dynamo", "yaml", "tensorboard", "triton"}),
        ("dex.weights", IMAGING | PROGRAMS | {"yaml", "tensorboard", "triton"}),
    ],
)
def test_import_stays_small(module, banned):
    modules = loaded_after(f"import {module}")
    assert {module, "torch"} <= modules
    assert not {m for m in modules if any(m == b or m.startswith(b + ".") for b in banned)}


def test_the_package_alone_loads_next_to_nothing():
    modules = loaded_after("import dex")
    heavy = IMAGING | PROGRAMS | {"torch", "numpy", "dexkernels", "yaml", "peft", "pyarrow", "sklearn"}
    assert "dex" in modules and not modules & heavy


def test_the_command_line_is_seen_where_it_is_loaded():
    """The check above can fail: `dex.cli` does load what `dex.model.mae` must not."""
    assert {"dex.cli", "yaml"} <= loaded_after("import dex.cli, yaml")


def test_public_names():
    import dexkernels

    assert set(dexkernels.__all__) == {
        *("DEXLayer", "Aux", "Routing", "route", "grouped_mlp", "align_loss", "group_ema_", "__version__"),
        *("upcycle_", "to_dense_", "collect_aux", "AuxCollector", "hold_weights", "mask_tokens", "optim", "shard"),
        "verify",
    }
    assert all(getattr(dexkernels, name) is not None for name in dexkernels.__all__)
