"""The factor that converts the activity of a PET series into standardised uptake values by body weight.

The steps follow the vendor-neutral pseudo-code of the QIBA profile (Units, CorrectedImage, DecayCorrection, the time to
which the images are decay-corrected), including times across midnight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from ..stack import Refused
from .file import GE_PET, PHILIPS_PET, listed, number, private, text

DAY = 86400.0
DOSE = (1e5, 1e11)  # Becquerel: a dose written in MBq or mCi by mistake is far outside
WEIGHT = (0.2, 500.0)  # Kilograms
_CORRECTED = {"ATTN": "AttenuationCorrected", "DECY": "DecayCorrected"}
UNITS = {"{suvbw}g/ml": "GML", "g/ml{suvbw}": "GML", "bq/ml": "BQML"}
"""Units as written in enhanced files, in any letter case, the preferred ones first."""


class Uptake(NamedTuple):
    """The header of one PET file. Dates and times are as in the header, "" if absent; absent numbers are None.
    ``corrected_to``: the time to which an enhanced file is decay-corrected; other files say START or ADMIN."""

    units: str
    suv_type: str
    decay_correction: str
    corrected_to: str
    corrected: tuple[str, ...]
    weight: float | None
    dose: float | None
    half_life: float | None
    injection_time: str
    injection: str
    series: str
    series_date: str
    acquisition: str
    ge_scan: str
    philips_suv: float | None
    philips_activity: float | None


def uptake(head: Any, units: str = "") -> Uptake:
    """From the header of one file. units: from the frames' own mapping, "" if there is none."""
    items = head.get("RadiopharmaceuticalInformationSequence") or []
    drug = items[0] if len(items) == 1 else {}
    date, time = text(head, "AcquisitionDate") or text(head, "SeriesDate"), text(head, "AcquisitionTime")
    return Uptake(
        units=units or text(head, "Units"),
        suv_type=text(head, "SUVType"),
        decay_correction=text(head, "DecayCorrection"),
        corrected_to=text(head, "DecayCorrectionDateTime"),
        corrected=tuple(str(v) for v in listed(head.get("CorrectedImage")))
        + tuple(name for name, keyword in _CORRECTED.items() if text(head, keyword) == "YES"),
        weight=number(head.get("PatientWeight")),
        dose=number(drug.get("RadionuclideTotalDose")),
        half_life=number(drug.get("RadionuclideHalfLife")),
        injection_time=text(drug, "RadiopharmaceuticalStartTime"),
        injection=text(drug, "RadiopharmaceuticalStartDateTime"),
        series=text(head, "SeriesDate") + text(head, "SeriesTime") if text(head, "SeriesTime") else "",
        series_date=text(head, "SeriesDate"),
        acquisition=text(head, "AcquisitionDateTime") or (date + time if date and time else ""),
        ge_scan=_text_of(private(head, 0x0009, GE_PET, 0x0D)),
        philips_suv=number(_text_of(private(head, 0x7053, PHILIPS_PET, 0x00))),
        philips_activity=number(_text_of(private(head, 0x7053, PHILIPS_PET, 0x09))),
    )


def factor(files: Sequence[Uptake]) -> float:
    """SUV = factor * rescaled value, for all files of one series. Raises Refused if the headers do not suffice."""
    first = files[0]
    same = ("units", "decay_correction", "corrected_to", "weight", "dose", "half_life", "injection", "injection_time")
    for name in (*same, "suv_type"):
        if any(getattr(file, name) != getattr(first, name) for file in files):
            raise Refused("inconsistent", f"SUV: {name.replace('_', ' ')} differs within the series")
    if first.suv_type not in ("", "BW"):
        raise Refused("unsupported", "SUV: not by body weight")
    if first.units == "GML":
        return 1.0
    missing = [name for name in ("ATTN", "DECY") if name not in first.corrected]
    if missing:
        raise Refused("inconsistent", f"SUV: not corrected for {' and '.join(missing)}")
    if first.decay_correction not in ("START", "ADMIN") and not first.corrected_to:
        raise Refused("inconsistent", "SUV: decay correction is neither START nor ADMIN")
    if first.units == "CNTS":
        suv = {file.philips_suv for file in files}
        if len(suv) == 1 and first.philips_suv:
            return first.philips_suv
        activity = {file.philips_activity for file in files}
        if len(activity) == 1 and first.philips_activity:
            return first.philips_activity * _by_weight(files)
        raise Refused("inconsistent", "SUV: counts without a calibration factor")
    if first.units != "BQML":
        raise Refused("inconsistent", "SUV: units are none of BQML, CNTS, GML")
    return _by_weight(files)


def _by_weight(files: Sequence[Uptake]) -> float:
    first = files[0]
    if first.weight is None or not WEIGHT[0] <= first.weight <= WEIGHT[1]:
        raise Refused("inconsistent", "SUV: no credible body weight")
    if first.dose is None or not DOSE[0] <= first.dose <= DOSE[1]:
        raise Refused("inconsistent", "SUV: no credible injected dose in becquerel")
    grams_per_becquerel = first.weight * 1000 / first.dose
    if first.decay_correction == "ADMIN":
        return grams_per_becquerel
    if first.half_life is None or not first.half_life > 0:
        raise Refused("inconsistent", "SUV: no half-life")
    return grams_per_becquerel * math.exp2(_decay_seconds(files) / first.half_life)


def _decay_seconds(files: Sequence[Uptake]) -> float:
    """Seconds from the injection to the time to which the images are corrected."""
    first = files[0]
    acquired = [moment for moment in (_moment(file.acquisition) for file in files) if moment]
    series = _moment(first.series)
    if first.corrected_to:
        scan = _moment(first.corrected_to)
    elif series and (not acquired or series <= min(acquired)):
        scan = series
    else:  # The series was rewritten later: its time is not that of the scan
        scan = _moment(first.ge_scan) or (min(acquired) if acquired else None)
    if scan is None:
        raise Refused("inconsistent", "SUV: no time of the scan")
    injected = _moment(first.injection)
    if injected is None:
        clock = _moment(scan.strftime("%Y%m%d") + first.injection_time) if first.injection_time else None
        if clock is None:
            raise Refused("inconsistent", "SUV: no time of the injection")
        injected = clock if clock <= scan else clock - timedelta(days=1)
    seconds = (scan - injected).total_seconds()
    if not 0 <= seconds <= DAY:
        raise Refused("inconsistent", "SUV: the scan is not within a day after the injection")
    return seconds


def _moment(value: str) -> datetime | None:
    """A DICOM date and time, YYYYMMDD[HHMM[SS[.ffffff]]]. A UTC offset is ignored, since other times have none."""
    digits, _, fraction = value.strip().split("+")[0].split("-")[0].partition(".")
    try:
        moment = datetime.strptime(digits, {14: "%Y%m%d%H%M%S", 12: "%Y%m%d%H%M", 10: "%Y%m%d%H"}[len(digits)])
        return moment + timedelta(seconds=float(f"0.{fraction}")) if fraction else moment
    except (KeyError, ValueError):
        return None


def _text_of(value) -> str:
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace").strip(" \0")
    return "" if value is None else str(value)


def mapping(groups: Sequence[Any]) -> tuple[str, float, float] | None:
    """Units, slope and intercept of a frame's stored values, from its functional groups; None if they give none of
    UNITS."""
    items = next((items for group in groups if (items := group.get("RealWorldValueMappingSequence"))), [])
    scales = {}
    for item in items:
        code = (item.get("MeasurementUnitsCodeSequence") or [{}])[0]
        slope, intercept = (number(item.get(f"RealWorldValue{name}")) for name in ("Slope", "Intercept"))
        if slope and intercept is not None:
            scales.setdefault(text(code, "CodeValue").lower(), (slope, intercept))
    return next(((units, *scales[code]) for code, units in UNITS.items() if code in scales), None)
