"""The modalities of the catalogue: their names and aliases, and how the images of each are normalised.

    resolve("mri")                             # the modality MR
    resolve("Photoacoustic", "display")        # a free name, with its own normalisation
    of_dicom("DX")                             # "X-ray"
    of_folder("Dermoscopy")                    # "clinical photography"

Names and aliases match without regard to letter case, spaces, "-" and "_". Nothing else matches: a misspelt name is an
error that suggests the closest one, never a guess.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

NORMALISATIONS = ("ct", "mr", "pet", "suv", "display")
"""Names of the rules of ``normalise`` in descriptions."""
AUTO, FROM_FOLDERS = "auto", "from-folders"
"""Values instead of a modality: the header decides, or the folder decides. No modality may have these names."""
MIN_FOREGROUND = 0.05
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ._-]{0,62}[A-Za-z0-9])?")
_SEPARATORS = re.compile(r"[\s_-]+")


class Modality(NamedTuple):
    """name: as shown in shards, cards and messages. normalisation: the rule of the corpus. aliases: other names, in the
    form of ``key``. min_foreground: the least foreground share of a kept slice. crop: whether pictures are cropped to
    the centre square, not padded. volumes: whether its images are slices of volumes. pieces: whether a picture too
    large for one image is cut into images at its own resolution, not shrunk."""

    name: str
    normalisation: str = "display"
    aliases: tuple[str, ...] = ()
    min_foreground: float = MIN_FOREGROUND
    crop: bool = False
    volumes: bool = False
    pieces: bool = False


CATALOGUE = (
    Modality("CT", "ct", ("ctscan", "ctscans", "computedtomography"), volumes=True),
    Modality("MR", "mr", ("mri", "mriscan", "mriscans", "magneticresonance", "magneticresonanceimaging"), volumes=True),
    Modality("PET", "pet", ("pt", "positronemissiontomography"), 0.01, volumes=True),
    Modality(
        "X-ray",
        aliases=(
            *("cr", "dx", "dr", "rg", "mg", "xa", "rf", "px", "io"),
            *("xr", "xrays", "cxr", "chestxray", "chestxrays", "radiograph", "radiographs", "radiography"),
            *("mammography", "mammogram", "mammograms", "angiography", "fluoroscopy"),
        ),
    ),
    Modality("ultrasound", aliases=("us", "usg", "sonography", "echo", "echocardiography")),
    Modality("fundus", aliases=("op", "cfp", "fundusphotography", "retinalphotography"), crop=True),
    Modality("OCT", aliases=("opt", "octa", "opticalcoherencetomography")),
    Modality("pathology", aliases=("sm", "gm", "histology", "histopathology", "microscopy"), crop=True, pieces=True),
    Modality("endoscopy", aliases=("es", "colonoscopy", "gastroscopy", "laparoscopy"), crop=True),
    Modality(
        "clinical photography",
        aliases=(
            *("xc", "dms", "photo", "photos", "photograph", "photographs", "photography", "clinicalphoto"),
            *("clinicalphotos", "dermoscopy", "dermatoscopy"),
        ),
        crop=True,
    ),
)
NAMES = tuple(modality.name for modality in CATALOGUE)

_DICOM = {
    "CT": ("CT",),
    "MR": ("MR", "MA"),
    "PET": ("PT",),
    "X-ray": ("CR", "DX", "RG", "MG", "XA", "RF", "PX", "IO", "DS", "CF", "DF"),
    "ultrasound": ("US", "IVUS", "BDUS", "DD", "CD", "EC"),
    "fundus": ("OP", "FS"),
    "OCT": ("OPT", "OCT", "IVOCT"),
    "pathology": ("SM", "GM"),
    "endoscopy": ("ES", "LP"),
    "clinical photography": ("XC", "DMS"),
}
"""Codes of the element Modality, including retired ones (PS3.3, C.7.3.1.1.1). Other codes are outside the catalogue:
nuclear medicine, radiotherapy images, thermography, ophthalmic mapping, "other", ..."""
_BY_CODE = {code: name for name, codes in _DICOM.items() for code in codes}


def key(text: str) -> str:
    """The common form of all spellings of a name: "X-Ray", "x_ray" and "xray" become "xray"."""
    return _SEPARATORS.sub("", text.strip()).casefold()


_BY_KEY = {alias: modality for modality in CATALOGUE for alias in (key(modality.name), *modality.aliases)}
_OTHER_WORDS = {
    *("dms", "dr", "dx", "es", "gm", "io", "op", "opt", "pt", "px", "rf", "rg", "sm", "xc"),
    "angiography",
}
"""Aliases that often mean something else in the name of a folder: diabetic retinopathy, diagnosis, end-systole, grey
matter, operation, options, patient, prescription, smoker, angiography by CT or OCT, ... Commands may use them; folders
with these names have no modality."""
_VAGUE = {
    *("photo", "photos", "photograph", "photographs", "photography", "clinicalphoto", "clinicalphotos", "microscopy"),
    *("angiography", "fluoroscopy", "echo", "octa", "laparoscopy"),
}
_CODES = {"us", "usg", "xr", "cr", "mg", "xa", "cfp"}
_RESERVED = {key(word) for word in (AUTO, FROM_FOLDERS)}


def known(text: str) -> Modality | None:
    """The catalogue's modality with that name or alias, or None."""
    return _BY_KEY.get(key(text))


def resolve(text: str, normalisation: str | None = None) -> Modality:
    """The modality that a user names, with another normalisation if one is given.

    A name outside the catalogue is the user's own modality. It needs a normalisation, and must not look like a misspelt
    name of the catalogue. Raises ValueError, with the valid names, for an invalid name or normalisation.
    """
    if normalisation is not None and normalisation not in NORMALISATIONS:
        allowed = ", ".join(NORMALISATIONS)
        raise ValueError(f"normalisation: expected one of {allowed}, got {normalisation!r}")
    modality = known(text)
    if modality is not None:
        return modality if normalisation is None else modality._replace(normalisation=normalisation)
    name = " ".join(text.split())
    if not _NAME.fullmatch(name) or key(name) in _RESERVED:
        raise ValueError(f"modality: expected {', '.join(NAMES)}, or a name of your own, got {text!r}")
    misspelt = [word for word in _BY_KEY if len(word) > 1 and _one_off(key(name), word)]
    if normalisation is None or misspelt:
        close = misspelt or difflib.get_close_matches(key(name), _BY_KEY, n=1, cutoff=0.75)
        meant = f" (did you mean {_BY_KEY[close[0]].name!r}?)" if close else ""
        raise ValueError(
            f"modality: expected one of {', '.join(NAMES)}, got {text!r}{meant}. "
            f"A modality of your own needs --normalisation, one of {', '.join(NORMALISATIONS)}"
        )
    return Modality(name, normalisation)


def of_dicom(code: str) -> str | None:
    """The catalogue's name for a value of the DICOM element Modality, or None."""
    return _BY_CODE.get(code.strip().upper())


def of_folder(name: str) -> str | None:
    """The catalogue's name of the modality that a folder is named after; None for any other name, and for words that
    often mean something else there."""
    modality = None if key(name) in _OTHER_WORDS else known(name)
    return None if modality is None else modality.name


def surely_of_folders(folders: Sequence[str]) -> set[str]:
    """The catalogue's names of the modalities that the folders above a file, from the root on, clearly name.

    Vague words name none. A code (``US``, ``XR``, ...) does if it is in capitals or if its folder holds the file
    itself: ``us`` above other folders may be a country. ``PT`` does if both hold, since it often is a patient.
    """
    names = set()
    for place, folder in enumerate(folders, start=1):
        word, capitals, holds = key(folder), folder.isupper(), place == len(folders)
        if word == "pt" and capitals and holds:
            names.add(_BY_KEY[word].name)
        elif word not in _VAGUE and (word not in _CODES or capitals or holds):
            names.add(of_folder(folder))
    return names - {None}


def _one_off(first: str, second: str) -> bool:
    """Whether two words differ by one letter: missing, added or changed."""
    short, long = sorted((first, second), key=len)
    if len(short) == len(long):
        return sum(a != b for a, b in zip(short, long, strict=True)) == 1
    return len(long) == len(short) + 1 and any(short == long[:i] + long[i + 1 :] for i in range(len(long)))
