"""Standardised uptake: from each vendor's header, and raw numbers where it does not suffice."""

import datetime
import math

import numpy as np
import pydicom
import pytest
from dicom_files import AXIAL, read, slice_of, stored, write
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    PositronEmissionTomographyImageStorage,
)

# SUV by body weight. The image holds 1000 Bq/ml; F-18 has a half-life of 6586.2 s.
HALF_LIFE = 6586.2


WEIGHT, DOSE = 70.0, 3.5e8


def pet(path, z=0, drug=None, **elements):
    item = Dataset()
    for name, value in {
        "RadionuclideTotalDose": DOSE,
        "RadionuclideHalfLife": HALF_LIFE,
        "RadiopharmaceuticalStartTime": "090000.00",
        **(drug or {}),
    }.items():
        if value is not None:
            setattr(item, name, value)
    header = {
        "Modality": "PT",
        "Units": "BQML",
        "DecayCorrection": "START",
        "CorrectedImage": ["ATTN", "DECY", "SCAT"],
        "PatientWeight": WEIGHT,
        "SeriesDate": "20200101",
        "SeriesTime": "100000",
        "AcquisitionDate": "20200101",
        "AcquisitionTime": "100000",
        "RescaleSlope": 2,
        "RescaleIntercept": 0,
        "RadiopharmaceuticalInformationSequence": Sequence([item]),
    }
    values = {name: value for name, value in (header | elements).items() if value is not None}
    return slice_of(path, np.full((4, 4), 500, np.int16), z, kind=PositronEmissionTomographyImageStorage, **values)


def suv(path):
    (stack,) = read(path)
    return stored(stack)[0][0, 0] if stack.quantity == "SUV" else stack.note


def test_suv_of_an_hour(tmp_path):
    decayed = DOSE * math.exp(-math.log(2) * 3600 / HALF_LIFE)
    assert suv(pet(tmp_path / "a.dcm")) == pytest.approx(1000 / (decayed / (WEIGHT * 1000)), rel=1e-6)


def test_suv_to_the_time_of_injection(tmp_path):
    assert suv(pet(tmp_path / "a.dcm", DecayCorrection="ADMIN")) == pytest.approx(1000 * 70000 / DOSE, rel=1e-6)


def test_suv_across_midnight(tmp_path):
    expected = 1000 * 70000 / (DOSE * 0.5 ** (2 * 3600 / HALF_LIFE))
    times = {"SeriesTime": "010000", "AcquisitionTime": "010000"}
    clock = pet(tmp_path / "a.dcm", drug={"RadiopharmaceuticalStartTime": "230000"}, **times)
    assert suv(clock) == pytest.approx(expected, rel=1e-6)
    dated = {"RadiopharmaceuticalStartTime": None, "RadiopharmaceuticalStartDateTime": "20191231230000.000000"}
    assert suv(pet(tmp_path / "b.dcm", drug=dated, **times)) == pytest.approx(expected, rel=1e-6)


def test_suv_of_a_rewritten_series_takes_the_first_acquisition(tmp_path):
    """The series' time lies after the acquisitions': the earliest of these is what decay was corrected to."""
    for z, time in ((0, "100500"), (1, "100000")):
        pet(tmp_path / f"{z}.dcm", z, SeriesTime="150000", AcquisitionTime=time)
    (stack,) = read(*sorted(tmp_path.iterdir()))
    expected = 1000 * 70000 / (DOSE * 0.5 ** (3600 / HALF_LIFE))
    assert [frame[0, 0] for frame in stored(stack)] == pytest.approx([expected, expected], rel=1e-6)


def test_suv_takes_the_scan_time_of_ge(tmp_path):
    path = pet(tmp_path / "a.dcm", SeriesTime="150000", AcquisitionTime="100500")
    head = pydicom.dcmread(path)
    head.private_block(0x0009, "GEMS_PETD_01", create=True).add_new(0x0D, "DT", "20200101100000.00")
    head.save_as(path)
    assert suv(path) == pytest.approx(1000 * 70000 / (DOSE * 0.5 ** (3600 / HALF_LIFE)), rel=1e-6)


def test_suv_with_slopes_per_slice_and_other_units(tmp_path):
    for z in range(2):
        pet(tmp_path / f"{z}.dcm", z, RescaleSlope=1 + z, DecayCorrection="ADMIN")
    (stack,) = read(*sorted(tmp_path.iterdir()))
    assert [frame[0, 0] for frame in stored(stack)] == pytest.approx([0.1, 0.2])
    assert suv(pet(tmp_path / "gml.dcm", Units="GML", RescaleSlope=0.01)) == pytest.approx(5.0)
    counts = pet(tmp_path / "cnts.dcm", Units="CNTS")
    assert "calibration" in suv(counts)
    for element, value, expected in (
        (0x00, "0.004", 1000 * 0.004),
        (0x09, "3.0", 3000 * 70000 / (DOSE * 0.5 ** (3600 / HALF_LIFE))),
    ):
        head = pydicom.dcmread(pet(tmp_path / "cnts.dcm", Units="CNTS"))
        head.private_block(0x7053, "Philips PET Private Group", create=True).add_new(element, "DS", value)
        head.save_as(counts)
        assert suv(counts) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "elements, drug, why",
    [
        ({"PatientWeight": None}, {}, "weight"),
        ({"PatientWeight": 0}, {}, "weight"),
        ({}, {"RadionuclideTotalDose": None}, "dose"),
        ({}, {"RadionuclideTotalDose": 350.0}, "dose"),  # in MBq
        ({}, {"RadionuclideHalfLife": None}, "half-life"),
        ({}, {"RadiopharmaceuticalStartTime": None}, "injection"),
        ({"Units": "PROPCPS"}, {}, "units"),
        ({"DecayCorrection": "NONE"}, {}, "decay correction"),
        ({"CorrectedImage": ["ATTN"]}, {}, "DECY"),
        ({"SUVType": "LBM"}, {}, "body weight"),
        ({"SeriesTime": None, "AcquisitionTime": None}, {}, "time of the scan"),
    ],
)
def test_without_what_suv_needs_the_numbers_are_raw(tmp_path, elements, drug, why):
    assert why in suv(pet(tmp_path / "a.dcm", drug=drug, **elements))


def test_suv_needs_one_weight_in_a_series(tmp_path):
    for z in range(2):
        pet(tmp_path / f"{z}.dcm", z, PatientWeight=70 + z)
    (stack,) = read(*sorted(tmp_path.iterdir()))
    assert stack.quantity == "raw" and "weight" in stack.note


def coded(units, slope, intercept=0.0):
    """One real world value mapping."""
    item, code = Dataset(), Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = units, "UCUM", "units"
    item.RealWorldValueSlope, item.RealWorldValueIntercept = slope, intercept
    item.MeasurementUnitsCodeSequence = Sequence([code])
    return item


def enhanced_pet(path, mappings, per_frame=None, drug=None, **elements):
    """Three frames of 500, 501 and 502 in one file; `per_frame`: mappings of each frame in the place of the shared."""
    shared, item, groups = Dataset(), Dataset(), []
    turned, measures = Dataset(), Dataset()
    turned.ImageOrientationPatient, measures.PixelSpacing = AXIAL, [2.0, 3.0]
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([turned]), Sequence([measures])
    transform = Dataset()
    transform.RescaleSlope, transform.RescaleIntercept, transform.RescaleType = 7, 9, "US"
    shared.PixelValueTransformationSequence = Sequence([transform])
    if mappings:
        shared.RealWorldValueMappingSequence = Sequence(mappings)
    for z in range(3):
        group, plane = Dataset(), Dataset()
        plane.ImagePositionPatient = [0, 0, 4 * z]
        group.PlanePositionSequence = Sequence([plane])
        if per_frame:
            group.RealWorldValueMappingSequence = Sequence(per_frame[z])
        groups.append(group)
    for name, value in {
        "RadionuclideTotalDose": DOSE,
        "RadionuclideHalfLife": HALF_LIFE,
        "RadiopharmaceuticalStartDateTime": "20200101090000",
        **(drug or {}),
    }.items():
        setattr(item, name, value)
    header = {
        "Modality": "PT",
        "PatientWeight": WEIGHT,
        "DecayCorrected": "YES",
        "AttenuationCorrected": "YES",
        "DecayCorrectionDateTime": "20200101100000.000000",
        "AcquisitionDateTime": "20200101103000",  # later than what decay was corrected to
        "RadiopharmaceuticalInformationSequence": Sequence([item]),
        "SharedFunctionalGroupsSequence": Sequence([shared]),
        "PerFrameFunctionalGroupsSequence": Sequence(groups),
    }
    pixels = np.stack([np.full((4, 4), 500 + z, np.uint16) for z in range(3)])
    values = {name: value for name, value in (header | elements).items() if value is not None}
    return write(path, pixels, kind="1.2.840.10008.5.1.4.1.1.130", **values)


def test_suv_of_an_enhanced_file(tmp_path):
    """The mapping's numbers, not the rescale's; decay to the time that the header names."""
    per_becquerel = WEIGHT * 1000 / (DOSE * 0.5 ** (3600 / HALF_LIFE))
    (stack,) = read(enhanced_pet(tmp_path / "a.dcm", [coded("Bq/ml", 2.0, 10.0)]))
    assert stack.quantity == "SUV" and stack.volume and stack.geometry.spacing == (3.0, 2.0, 4.0)
    expected = [(2 * (500 + z) + 10) * per_becquerel for z in range(3)]
    assert [frame[0, 0] for frame in stored(stack)] == pytest.approx(expected, rel=1e-6)
    # each frame has a slope of its own, and in grams per millilitre no more is needed, whatever stands beside it
    for units in ("{SUVbw}g/ml", "g/ml{SUVbw}"):
        per_frame = [[coded("Bq/ml", 5.0), coded(units, 0.01 * (z + 1), -1.0)] for z in range(3)]
        bare = {"PatientWeight": None, "DecayCorrected": None}
        (stack,) = read(enhanced_pet(tmp_path / "b.dcm", [coded("Bq/ml", 3.0)], per_frame, **bare))
        expected = [(500 + z) * 0.01 * (z + 1) - 1 for z in range(3)]
        assert stack.quantity == "SUV"
        assert [frame[0, 0] for frame in stored(stack)] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "mappings, per_frame, elements, why",
    [
        ([], None, {}, "units"),
        ([coded("{counts}/s", 2.0)], None, {}, "units"),
        ([coded("{SUVlbm}g/ml", 2.0)], None, {}, "units"),
        ([], [[coded("Bq/ml", 1.0)], [coded("{SUVbw}g/ml", 1.0)], [coded("Bq/ml", 1.0)]], {}, "units"),
        ([coded("Bq/ml", 2.0)], None, {"DecayCorrected": "NO"}, "DECY"),
        ([coded("Bq/ml", 2.0)], None, {"AttenuationCorrected": None}, "ATTN"),
        ([coded("Bq/ml", 2.0)], None, {"DecayCorrectionDateTime": None}, "decay correction"),
        ([coded("Bq/ml", 2.0)], None, {"DecayCorrectionDateTime": "20200101085959"}, "within a day"),
        ([coded("Bq/ml", 2.0)], None, {"PatientWeight": None}, "weight"),
    ],
)
def test_an_enhanced_file_without_what_suv_needs_is_raw(tmp_path, mappings, per_frame, elements, why):
    (stack,) = read(enhanced_pet(tmp_path / "a.dcm", mappings, per_frame, **elements))
    assert stack.quantity == "raw" and why in stack.note


def test_suv_of_a_converted_file(tmp_path):
    """Elements of single images that have no place in an enhanced file are kept aside; slopes are each frame's."""
    aside = Dataset()
    aside.Units, aside.DecayCorrection, aside.CorrectedImage = "BQML", "START", ["ATTN", "DECY"]
    bare = {"DecayCorrected": None, "AttenuationCorrected": None, "DecayCorrectionDateTime": None}
    times = {"SeriesDate": "20200101", "SeriesTime": "100000"}
    path = enhanced_pet(tmp_path / "a.dcm", [], **bare, **times)
    head = pydicom.dcmread(path)
    shared = head.SharedFunctionalGroupsSequence[0]
    shared.UnassignedSharedConvertedAttributesSequence = Sequence([aside])
    del shared.PixelValueTransformationSequence
    for z, group in enumerate(head.PerFrameFunctionalGroupsSequence):
        transform = Dataset()
        transform.RescaleSlope, transform.RescaleIntercept, transform.RescaleType = 1 + z, 0, "BQML"
        group.PixelValueTransformationSequence = Sequence([transform])
    head.save_as(path)
    (stack,) = read(path)
    per_becquerel = WEIGHT * 1000 / (DOSE * 0.5 ** (3600 / HALF_LIFE))
    assert stack.quantity == "SUV"
    expected = [(500 + z) * (1 + z) * per_becquerel for z in range(3)]
    assert [frame[0, 0] for frame in stored(stack)] == pytest.approx(expected, rel=1e-6)


def test_dates_without_sense(tmp_path):
    late = {"RadiopharmaceuticalStartDateTime": (datetime.datetime(2019, 1, 1)).strftime("%Y%m%d%H%M%S")}
    assert "within a day" in suv(pet(tmp_path / "b.dcm", drug=late))
