"""Decide from a DICOM header: the modality and normalisation of a file's images, or a reason to leave it out.

    decide(facts_of(header, has_pixels=True))          # Decision(modality="CT", normalisation="ct", ...)
    decide(facts, resolve("MR")).left_out              # "another modality": the header contradicts the user

The first row of ``RULES`` that applies decides. A row holds the reason, the detail, the section of the DICOM standard
(PS3.3 unless it says otherwise) or the manufacturer that defines it, and the test. A file that no row leaves out needs
a SOP class and a Modality that agree; otherwise nothing is guessed.

DERIVED, as the first value of Image Type, is no reason to leave out a file: compressed and reformatted images are
DERIVED too. The third and later values decide. A series description may contain names of people: it is only searched
for a few words, and no value of a header appears in a decision.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from .modalities import NAMES, Modality, known, of_dicom

REASONS = (
    "structured report",
    "dose report",
    "key object selection",
    "encapsulated document",
    "presentation state",
    "waveform",
    "radiotherapy object",
    "segmentation",
    "secondary capture",
    "screenshot",
    "localizer",
    "derived map",
    "projection",
    "rendering",
    "for processing",
    "whole slide",
    "no image",
    "contradictory header",
    "unknown modality",
    "another modality",
)
"""Reasons to leave out a DICOM file."""
_STORAGE = "1.2.840.10008.5.1.4.1.1."
_TOMOGRAPHIC = ("CT", "MR", "PET")
GREY = (*_TOMOGRAPHIC, "X-ray")
"""Modalities without colour."""


class Facts(NamedTuple):
    """The values of a header that ``decide`` uses: stripped upper case, "" where absent. description: words of the
    series description, only for searching."""

    sop_class: str = ""
    modality: str = ""
    image_type: tuple[str, ...] = ()
    photometric: str = ""
    body_part: str = ""
    description: tuple[str, ...] = ()
    intent: str = ""
    conversion: str = ""
    rescale_type: str = ""
    component: str = ""
    technique: str = ""
    series_type: tuple[str, ...] = ()
    has_pixels: bool = True

    def __repr__(self) -> str:
        return "Facts(...)"  # Keep the header's values out of tracebacks


class Decision(NamedTuple):
    """modality, normalisation, planes: of the file's images, as a description spells them; left_out: "", or one of
    REASONS. detail: the reason in words of this module, without values of the header."""

    modality: str = ""
    normalisation: str = ""
    planes: tuple[str, ...] = ()
    left_out: str = ""
    detail: str = ""


class Rule(NamedTuple):
    reason: str
    detail: str
    source: str
    applies: Callable[[Facts], bool]


def facts_of(head: Any, has_pixels: bool = True) -> Facts:
    """The facts in a header: a pydicom data set, or anything else whose ``get`` takes keywords. Never raises."""
    transform = _item(_item(head, "SharedFunctionalGroupsSequence"), "PixelValueTransformationSequence")
    values = _values(head, "ImageType")
    return Facts(
        sop_class=_text(head, "SOPClassUID"),
        modality=_text(head, "Modality"),
        image_type=values,
        photometric=_text(head, "PhotometricInterpretation"),
        body_part=_text(head, "BodyPartExamined"),
        description=tuple(re.findall(r"[A-Z0-9*]+", _text(head, "SeriesDescription"))),
        intent=_text(head, "PresentationIntentType"),
        conversion=_text(head, "ConversionType"),
        rescale_type=_text(transform, "RescaleType") or _text(head, "RescaleType"),
        component=_text(head, "ComplexImageComponent"),
        technique=_text(head, "VolumeBasedCalculationTechnique"),
        series_type=_values(head, "SeriesType"),
        has_pixels=has_pixels,
    )


def decide(facts: Facts, wanted: Modality | None = None) -> Decision:
    """The modality of a file's images, or the reason to leave it out.

    wanted: the modality that the user gave. A file whose header names another one is left out. A header without a
    modality takes the user's. So does one with a modality outside the catalogue, if the user's is outside it too.
    """
    rule = next((rule for rule in RULES if rule.applies(facts)), None)
    silent = not facts.sop_class and facts.modality in ("", "OT")
    unknown = rule is not None and rule.reason == "unknown modality"
    if rule is not None and not (unknown and wanted is not None and (silent or wanted.name not in NAMES)):
        return Decision(left_out=rule.reason, detail=rule.detail)
    modality = wanted if rule is not None else known(_modality(facts))
    if wanted is not None and modality.name != wanted.name:
        return Decision(left_out="another modality", detail=f"the header says {modality.name}, not {wanted.name}")
    chosen = wanted or modality
    return Decision(chosen.name, chosen.normalisation, ("auto",) if chosen.volumes else ("stored",))


def _modality(facts: Facts) -> str:
    """The catalogue's name on which SOP class and Modality agree, or that one gives if the other is absent; else ""."""
    code, kind = of_dicom(facts.modality) or "", _IMAGES.get(_short(facts.sop_class), "")
    if not facts.modality or not facts.sop_class:
        return code or kind
    return code if code == kind else ""


def _short(sop_class: str) -> str:
    """A storage class without the standard's common root; any other UID unchanged."""
    return sop_class.removeprefix(_STORAGE)


def _grey(facts: Facts) -> bool:
    return _modality(facts) in GREY


def _tomographic(facts: Facts) -> bool:
    return _modality(facts) in _TOMOGRAPHIC


# The image classes of the catalogue's modalities (PS3.4, B.5; retired ones included), without the common root.
_IMAGES = {
    kind: name
    for name, kinds in {
        "X-ray": "1 1.1 1.1.1 1.2 1.2.1 1.3 1.3.1 12.1 12.1.1 12.2 12.2.1 12.3 13.1.3 13.1.4 13.1.5",
        "CT": "2 2.1 2.2",
        "MR": "4 4.1 4.3 4.4",
        "ultrasound": "3 3.1 6 6.1 6.2",
        "OCT": "14.1 14.2 77.1.5.4",
        "endoscopy": "77.1.1 77.1.1.1",
        "pathology": "77.1.2 77.1.2.1 77.1.3",
        "clinical photography": "77.1.4 77.1.4.1 77.1.7",
        "fundus": "77.1.5.1 77.1.5.2 77.1.5.5 77.1.5.6",
        "PET": "128 128.1 130",
    }.items()
    for kind in kinds.split()
}
_FOR_PROCESSING = ("1.1.1", "1.2.1", "1.3.1", "13.1.5", "14.2")


def _of_class(*kinds: str) -> Callable[[Facts], bool]:
    """The SOP class is one of these; a kind that ends in "." stands for all with that prefix."""
    exact = {kind for kind in kinds if not kind.endswith(".")}
    begins = tuple(kind for kind in kinds if kind.endswith("."))

    def applies(facts: Facts) -> bool:
        kind = _short(facts.sop_class)
        return kind in exact or (bool(begins) and kind.startswith(begins))

    return applies


def _of_modality(codes: str) -> Callable[[Facts], bool]:
    wanted = set(codes.split())
    return lambda facts: facts.modality in wanted


def _either(*tests: Callable[[Facts], bool]) -> Callable[[Facts], bool]:
    return lambda facts: any(test(facts) for test in tests)


def _both(*tests: Callable[[Facts], bool]) -> Callable[[Facts], bool]:
    return lambda facts: all(test(facts) for test in tests)


def _typed(*words: str) -> Callable[[Facts], bool]:
    """The third or a later value of Image Type is one of these."""
    wanted = set(words)
    return lambda facts: not wanted.isdisjoint(facts.image_type[2:])


def _described(*phrases: str) -> Callable[[Facts], bool]:
    """The series description contains one of these phrases, as consecutive words."""
    wanted = [tuple(phrase.split()) for phrase in phrases]

    def applies(facts: Facts) -> bool:
        words = facts.description
        return any(
            words[start : start + len(phrase)] == phrase
            for phrase in wanted
            for start in range(len(words) - len(phrase) + 1)
        )

    return applies


def _derived(facts: Facts) -> bool:
    """The image may be computed, and the values of Image Type that would say how are absent or empty."""
    return facts.image_type[:1] == ("DERIVED",) or facts.image_type[2:3] in ((), ("",), ("OTHER",))


def _computed(facts: Facts) -> bool:
    return _derived(facts) and "TRACEW" not in facts.image_type


def _colour(facts: Facts) -> bool:
    return facts.photometric.startswith(("RGB", "YBR", "PALETTE", "HSV", "ARGB", "CMYK"))


_LOCALIZER = re.compile(
    r"LOCALI[SZ]ERS?|LOCALI[SZ]ADOR(ES)?|PILOT|SCOUTS?|TOPOGRAMS?|TOPO|SURVIEW|SCANOGRAM|LOC|(3|THREE)PLANE"
)
_MAPS = (
    *("ADC", "ADC MAP", "ADC_UNSPECIFIED", "EADC", "EXP_ADC", "FA", "FA MAP", "COLFA", "TENSOR", "DIFFUSION_ANISO"),
    *("DIFFUSION MAP", "DENSITY MAP", "T1 MAP", "T2 MAP", "T2_STAR MAP", "T2* MAP", "R2 MAP", "R2_STAR MAP"),
    *("T1_MAP", "T2_MAP", "T1MAP", "T2MAP", "T2STARMAP", "R2STARMAP", "R2_STAR", "PHASE MAP", "VELOCITY MAP"),
    *("VELOCITY", "B0", "B1", "B0 MAP", "B1 MAP", "FIELD MAP", "FIELDMAP", "METABOLITE_MAPS", "METABOLITE MAP"),
    *("RCBF", "RCBV", "RELCBF", "RELCBV", "RELMTT", "CBF", "CBV", "MTT", "TTP", "TMAX", "PBP", "GBP", "PERFUSION_MAP"),
    *("KTRANS", "KEP", "IAUC", "AUC", "STIFFNESS", "ELASTOGRAM", "WAVE", "PDFF", "FAT_FRACTION", "FAT FRACTION"),
    *("T_TEST", "T-TEST", "TTEST", "Z_SCORE", "ZSCORE", "STD_DEVIATION", "STDDEV", "QUANTITY", "PARAMETRIC", "MIXED"),
    *("DIVISION", "MULTIPLICATION", "ADDITION", "SUBTRACTION", "SUBTRACT", "SUB", "IMAGE ADDITION"),
    *("MODULUS SUBTRACT", "PHASE SUBTRACT", "MATERIAL", "IODINE", "ZEFF", "Z_EFF", "EFF. ATOMIC NO", "SPECTROSCOPY"),
)
_MAP_WORDS = (
    *("ADC", "EADC", "APPARENT DIFFUSION", "FA MAP", "FRACTIONAL ANISO", "FRACTIONAL ANISOTROPY", "COLFA"),
    *("T1 MAP", "T2 MAP", "T2* MAP", "T1MAP", "T2MAP", "B0 MAP", "B1 MAP", "FIELD MAP", "PHASE MAP", "VELOCITY MAP"),
    *("CBF", "CBV", "RCBF", "RCBV", "MTT", "TTP", "TMAX", "KTRANS", "PERFUSION MAP", "PARAMETRIC MAP"),
    *("SUBTRACTION", "IODINE MAP", "FAT FRACTION", "PDFF"),
)
_SCREENS = ("SCREEN SAVE", "SCREENSAVE", "SCREEN SHOT", "SCREENSHOT", "SCREEN CAPTURE", "SCREENCAPTURE")
_OPHTHALMIC_FRONT = ("SLIT", "ANTERIOR", "CORNEA", "CORNEAL", "IRIS", "EXTERNAL", "EYELID", "LENS")


def _called_localizer(facts: Facts) -> bool:
    words = facts.description
    return (
        any(_LOCALIZER.fullmatch(word) for word in words)
        or _described("3 PLANE", "THREE PLANE", "PLANE LOC")(facts)
        or (_modality(facts) == "MR" and "SURVEY" in words)  # Philips; in CT, a "bone survey" is not a localizer
    )


def _front_of_the_eye(facts: Facts) -> bool:
    words = {*facts.description, *facts.body_part.split(), *facts.image_type[2:]}
    return not words.isdisjoint(_OPHTHALMIC_FRONT)


# Objects that are not images, by SOP class, then by Modality if the class is absent or private.
_OBJECTS = (
    Rule(
        "dose report",
        "an object of radiation dose",
        "A.35.8, A.35.14, A.35.18, A.35.22",
        _of_class("88.67", "88.68", "88.73", "88.76"),
    ),
    Rule("key object selection", "a list of other objects", "A.35.4", _of_class("88.59")),
    Rule("structured report", "a structured report", "A.35", _of_class("88.", "79.1")),
    Rule("encapsulated document", "a document: PDF, CDA, a model", "A.45, A.85", _of_class("104.")),
    Rule("presentation state", "how to show other images", "A.33, A.80", _of_class("11.")),
    Rule("waveform", "an ECG, audio or another waveform", "A.34", _of_class("9.", "129")),
    Rule("segmentation", "labels of another image", "A.51, A.57", _of_class("66.4", "66.5", "66.7", "66.8")),
    Rule("unknown modality", "a radiotherapy image", "A.17, A.86", _of_class("481.1", "481.23", "481.24")),
    Rule(
        "radiotherapy object",
        "a dose, plan, record or structure set",
        "A.18 to A.20, A.29 to A.31, A.49, A.50, A.64, A.79, A.86",
        _of_class("481."),
    ),
    Rule(
        "derived map",
        "a parametric map",
        "A.67, A.73, A.75, A.83, A.84",
        _of_class("30", "81.1", "82.1", "77.1.5.8", "77.1.5.7"),
    ),
    Rule(
        "no image",
        "an object that holds no image",
        "A.33.5, A.36.3, A.37, A.39, A.40, A.43, A.46, A.60, A.65, A.68, A.69, A.78, A.81, A.82, A.87, A.88",
        _either(
            _of_class("4.2", "66", "66.", "67", "68.", "78.", "80.", "90.", "91.", "131", "200.", "201."),
            _of_class("77.1.5.3"),
            lambda facts: facts.sop_class in ("1.2.840.10008.1.3.10", "1.2.840.10008.5.1.4.38.1"),
            lambda facts: facts.sop_class.startswith(("1.2.840.10008.5.1.4.34.", "1.2.840.10008.5.1.4.4")),
        ),
    ),
    Rule("structured report", "a structured report", "C.7.3.1.1.1", _of_modality("SR SMR ASMT PLAN")),
    Rule("key object selection", "a list of other objects", "C.7.3.1.1.1", _of_modality("KO")),
    Rule("encapsulated document", "a document: PDF, CDA, a model", "C.7.3.1.1.1", _of_modality("DOC M3D")),
    Rule("presentation state", "how to show other images", "C.7.3.1.1.1", _of_modality("PR")),
    Rule(
        "waveform",
        "an ECG, audio or another waveform",
        "C.7.3.1.1.1",
        _of_modality("ECG EPS HD EEG EMG EOG RESP AU POS"),
    ),
    Rule("segmentation", "labels of another image", "C.7.3.1.1.1", _of_modality("SEG")),
    Rule(
        "radiotherapy object",
        "a dose, plan, record or structure set",
        "C.7.3.1.1.1",
        _of_modality("RTDOSE RTSTRUCT RTPLAN RTRECORD RTINTENT RTRAD RTSEGANN"),
    ),
    Rule(
        "no image",
        "an object that holds no image",
        "C.7.3.1.1.1",
        _of_modality("REG FID RWV ANN TEXTUREMAP STAIN CTPROTOCOL XAPROTOCOL INV"),
    ),
    Rule("no image", "an object without pixels", "C.7.6.3", lambda facts: not facts.has_pixels),
)
# Pictures made after the acquisition: of a screen, a page or numbers.
_CAPTURES = (
    Rule("dose report", "a page about dose", "GE, Siemens", _typed("DOSE_INFO", "DOSE INFO", "DOSE REPORT", "DOSE")),
    Rule(
        "dose report",
        "a page about dose",
        "Siemens, Philips, Canon",
        _described("DOSE REPORT", "DOSE INFO", "DOSE RECORD", "DOSE SUMMARY", "DOSE SHEET", "PATIENT PROTOCOL"),
    ),
    Rule("secondary capture", "a secondary capture", "A.8", _of_class("7", "7.")),
    Rule(
        "secondary capture",
        "a secondary capture",
        "C.8.6.1",
        lambda facts: not facts.sop_class and bool(facts.conversion),
    ),
    Rule("screenshot", "a picture of a screen", "GE", _typed(*_SCREENS)),
    Rule("screenshot", "a page of a report", "Siemens", _typed("REPORT", "CSA REPORT", "WORKSHEET", "REPORT PAGE")),
    Rule("screenshot", "a picture of a screen", "-", _described(*_SCREENS, "WORKSHEET")),
)
# Images of a modality outside the catalogue, or whose header does not name one.
_MODALITIES = (
    Rule("whole slide", "a whole slide", "A.32.8, A.90.2", _of_class("77.1.6", "77.1.9")),
    Rule(
        "unknown modality",
        "nuclear medicine",
        "A.5",
        _either(_of_class("5", "20"), _of_modality("NM ST")),
    ),
    Rule("unknown modality", "a radiotherapy image", "C.7.3.1.1.1", _of_modality("RTIMAGE")),
    Rule("unknown modality", "a volume made of X-ray projections", "A.53, A.54", _of_class("13.1.1", "13.1.2")),
    Rule("unknown modality", "photoacoustic imaging or confocal microscopy", "A.89, A.90", _of_class("6.3", "77.1.8")),
    Rule("unknown modality", "not of medical imaging", "DICOS, DICONDE", _of_class("501.", "601.")),
    Rule(
        "unknown modality",
        "neither SOP class nor Modality names one",
        "C.7.3.1.1.1",
        lambda facts: of_dicom(facts.modality) is None and _short(facts.sop_class) not in _IMAGES,
    ),
    Rule(
        "unknown modality",
        "a SOP class of a manufacturer's own",
        "PS3.4, B.5",
        lambda facts: bool(facts.sop_class) and _short(facts.sop_class) not in _IMAGES,
    ),
    Rule(
        "contradictory header",
        "SOP class and Modality name different ones",
        "C.7.3.1.1.1, PS3.4 B.5",
        lambda facts: not _modality(facts),
    ),
    Rule(
        "unknown modality",
        "an eye's front, not its fundus",
        "C.8.17.2",
        lambda facts: _modality(facts) == "fundus" and _front_of_the_eye(facts),
    ),
)
# Images computed by the scanner or a workstation, and images for planning others.
_IMAGE_TYPES = (
    Rule(
        "localizer",
        "a localizer",
        "C.8.2.1.1.1, C.8.16.1.3",
        _both(_tomographic, _typed("LOCALIZER", "LOCALISER", "SCOUT", "TOPOGRAM", "SURVIEW")),
    ),
    Rule(
        "localizer",
        "a localizer, by its series",
        "Siemens and Philips MR have no Image Type of it",
        _both(_tomographic, _called_localizer),
    ),
    Rule(
        "rendering",
        "colour in a modality of grey images",
        "C.8.2.1, C.8.3.1.1.3, C.8.13.1.1.2",
        _both(_grey, _either(_colour, _of_class("4.3"))),
    ),
    Rule(
        "rendering",
        "a rendered volume",
        "C.8.16.2.1.3, Siemens",
        _both(
            _tomographic,
            _either(
                _typed("VRT", "VOLUME RENDERING", "VOLREN", "SSD", "CSA 3D EDITING", "VOLUME_RENDER", "SURFACE_RENDER"),
                lambda facts: facts.technique in ("VOLUME_RENDER", "SURFACE_RENDER"),
            ),
        ),
    ),
    Rule(
        "projection",
        "a projection of a volume",
        "C.8.3.1.1.1, C.8.9.1.1.4, C.8.16.2.1.3, C.8.16.1.4",
        _both(
            _tomographic,
            _either(
                _typed("PROJECTION IMAGE", "MIP", "MINIP", "CSA MIP", "MAX_IP", "MIN_IP", "MAXIMUM", "MINIMUM"),
                lambda facts: facts.technique in ("MAX_IP", "MIN_IP") or "REPROJECTION" in facts.series_type,
                _both(_derived, _described("MIP", "MINIP", "MIPS", "MAX IP", "MIN IP")),
            ),
        ),
    ),
    Rule(
        "derived map",
        "computed values, not a signal",
        "C.8.3.1.1.1, C.8.13.1.1.1, C.8.16.1.4, and manufacturers",
        _both(_tomographic, _typed(*_MAPS)),
    ),
    Rule(
        "derived map",
        "computed values, by its series",
        "-",
        _both(_tomographic, _computed, _described(*_MAP_WORDS)),
    ),
    Rule(
        "derived map",
        "phase or imaginary part of the signal",
        "C.8.13.3.1.1, Siemens, Philips",
        lambda facts: (
            _modality(facts) == "MR"
            and (
                facts.component in ("PHASE", "IMAGINARY", "MIXED")
                or not {"P", "I", "PHASE", "IMAGINARY"}.isdisjoint(facts.image_type[2:])
            )
        ),
    ),
    Rule(
        "derived map",
        "values in other units than HU",
        "C.11.1.1.2",
        lambda facts: _modality(facts) == "CT" and facts.rescale_type not in ("", "HU", "US"),
    ),
    Rule(
        "for processing",
        "a detector's raw values",
        "C.8.11.1, C.8.27.1",
        lambda facts: (
            _modality(facts) in ("X-ray", "OCT")
            and (facts.intent == "FOR PROCESSING" or _short(facts.sop_class) in _FOR_PROCESSING)
        ),
    ),
)
RULES = (*_OBJECTS, *_CAPTURES, *_MODALITIES, *_IMAGE_TYPES)


def meaning(reason: str) -> str:
    """The files left out for this reason, in words."""
    if reason == "another modality":
        return "the header or the folder names another modality than the user"
    return "; ".join(dict.fromkeys(rule.detail for rule in RULES if rule.reason == reason))


def _value(head: Any, keyword: str) -> Any:
    try:
        return head.get(keyword)
    except Exception:  # pydicom converts a value on access, and a header may hold anything
        return None


def _plain(value: Any) -> str:
    try:
        return str(value).strip(" \0").upper()
    except Exception:
        return ""


def _text(head: Any, keyword: str) -> str:
    value = _value(head, keyword)
    return "" if value is None else _plain(value)


def _values(head: Any, keyword: str) -> tuple[str, ...]:
    value = _value(head, keyword)
    if value is None or isinstance(value, bytes):
        return ()
    if isinstance(value, str):
        return tuple(_plain(part) for part in value.split("\\"))
    try:
        return tuple(_plain(part) for part in value)
    except Exception:
        return ()


def _item(head: Any, keyword: str) -> Any:
    """The first item of a sequence, or an empty one."""
    value = _value(head, keyword)
    try:
        return value[0] if value else {}
    except Exception:
        return {}
