"""Models on the Hugging Face Hub. Needs huggingface_hub, of the extra ``adapt``.

from dex.inference.hub import DEXModel

DEXModel(dex.load("runs/demo")).push_to_hub("name/model")
loaded = DEXModel.from_pretrained("name/model").loaded  # what dex.load gives
"""

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download

from dex.inference.export import export
from dex.inference.load import Loaded, load

_FILES = ["config.json", "model.safetensors"]


class DEXModel(ModelHubMixin, library_name="dexkernels"):
    """A ``Loaded`` with ``save_pretrained``, ``push_to_hub`` and ``from_pretrained``, which use the folders of
    ``dex export --format hf``."""

    def __init__(self, loaded: Loaded):
        self.loaded = loaded

    def _save_pretrained(self, save_directory: Path) -> None:
        work = save_directory / "exported"
        export(self.loaded, "hf", work)
        for file in work.iterdir():
            shutil.copyfile(file, save_directory / file.name)
        shutil.rmtree(work)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision: str | None = None, **options: Any) -> "DEXModel":
        """model_id: a repository or a folder. options: those of the download (``cache_dir``, ``token``, ...), and
        ``img_size`` and ``path`` of ``dex.load``."""
        of_load = {name: options[name] for name in ("img_size", "path") if name in options}
        if Path(model_id).is_dir():
            return cls(load(model_id, **of_load))
        known = ("cache_dir", "local_files_only", "token", "force_download")
        download = {name: options[name] for name in known if name in options}
        folder = snapshot_download(model_id, revision=revision, allow_patterns=_FILES, **download)
        return cls(load(folder, **of_load))
