"""How the files of a unit are read, shared by ``dex prepare`` and inference on files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import label_maps, readers, routing
from .modalities import Modality, known
from .slices import enough, pieces
from .sources import Source


class Reading(NamedTuple):
    """source: for the unit's format (``Source.for_format``). path: of the unit's first file, below the source's root.
    stated: the modality from a table, "" if there is none."""

    source: Source
    path: str
    stated: str = ""

    def stacks(
        self,
        files: Sequence[Path],
        format: str,
        *,
        size: int | None,
        bits: int = 8,
        limits: readers.Limits = readers.Limits(),  # noqa: B008
        beat: Callable[[], None] | None = None,
        headers: bool = False,
    ) -> Iterator[readers.Stack]:
        """The stacks of the unit, from ``readers.read``.

        size: S of the images to make, with ``bits`` bits; None for frames at their own size. headers: read no pixels.
        """
        described = self.for_stack(None)
        whole = size is None or headers or label_maps.suspicious(self.path)  # A label map is judged by all its pixels
        return readers.read(
            files,
            format,
            limits=limits,
            beat=beat,
            decide=None if self.source.trusted else self._decide,
            volumes=self.source.volumes,
            enough=None if whole else enough(described, size, bits),
            pieces=0 if size is None else pieces(described, size),
            headers=headers,
        )

    def for_stack(self, stack: readers.Stack | None) -> Source:
        """The source with the stack's modality, or with the path's; unchanged if neither is known."""
        if stack is not None and stack.decision is not None:
            return self.source.for_modality(*stack.decision[:3])
        modality = self._modality()
        return self.source if modality is None else self.source.for_modality(modality.name, modality.normalisation)

    def rescale(self, stack: readers.Stack, format: str) -> None:
        """Apply the description's slope and intercept, if the format's headers have none."""
        if (self.source.slope, self.source.intercept) != (1, 0) and not readers.reader_of(format).decides:
            stack.rescale(self.source.slope, self.source.intercept)

    def _modality(self) -> Modality | None:
        return known(self.stated) if self.stated else self.source.modality_of(self.path)

    def _decide(self, head: Any, has_pixels: bool) -> routing.Decision:
        wanted = self._modality() if self.stated or not self.source.routed else None
        return routing.decide(routing.facts_of(head, has_pixels), wanted)
