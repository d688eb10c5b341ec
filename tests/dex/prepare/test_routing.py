import re

import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.uid import UID_dictionary

from dex.prepare.modalities import NAMES, NORMALISATIONS, resolve
from dex.prepare.routing import REASONS, RULES, Decision, Facts, decide, facts_of

ROOT = "1.2.840.10008.5.1.4.1.1."
AXIAL = ("ORIGINAL", "PRIMARY", "AXIAL")


def header(kind="", modality="", *image_type, **elements):
    named = {"SOPClassUID": ROOT + kind if kind else None, "Modality": modality or None}
    return named | {"ImageType": list(image_type) or None} | elements


def decided(*arguments, has_pixels=True, wanted=None, **elements):
    return decide(facts_of(header(*arguments, **elements), has_pixels), wanted)


IMAGES = [
    ("CT", "2", "CT", *AXIAL),
    ("CT", "2", "CT", "DERIVED", "PRIMARY", "AXIAL"),  # compressed
    ("CT", "2", "CT", "DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE"),
    ("CT", "2.1", "CT", "ORIGINAL", "PRIMARY", "VOLUME", "NONE"),
    ("CT", "", "CT", *AXIAL),
    ("CT", "2", ""),
    ("MR", "4", "MR", "ORIGINAL", "PRIMARY", "M", "ND", "NORM"),
    ("MR", "4", "MR", "DERIVED", "PRIMARY", "DIFFUSION", "TRACEW", "ND"),
    ("MR", "4", "MR", "DERIVED", "SECONDARY", "MPR", "CSA MPR", "", "CSAPARALLEL", "M", "ND", "NORM"),
    ("MR", "4.1", "MR", "ORIGINAL", "PRIMARY", "T1", "NONE"),
    ("MR", "4", " mr "),
    ("PET", "128", "PT", "ORIGINAL", "PRIMARY"),
    ("X-ray", "1", "CR", "DERIVED", "PRIMARY"),
    ("X-ray", "1.1", "DX", "ORIGINAL", "PRIMARY"),
    ("X-ray", "1.2", "MG", "ORIGINAL", "PRIMARY"),
    ("X-ray", "13.1.3", "MG", "DERIVED", "PRIMARY", "TOMOSYNTHESIS", "NONE"),
    ("X-ray", "12.1", "XA", "DERIVED", "PRIMARY", "SINGLE PLANE", "SUBTRACTION"),
    ("X-ray", "12.2", "RF", "ORIGINAL", "PRIMARY"),
    ("X-ray", "1", "RG"),
    ("ultrasound", "6.1", "US", "ORIGINAL", "PRIMARY", "AXIAL", "0001"),
    ("ultrasound", "3.1", "US", "DERIVED", "PRIMARY", "EPICARDIAL", "0001"),
    ("ultrasound", "6", "US"),
    ("ultrasound", "6.1", "IVUS"),
    ("fundus", "77.1.5.1", "OP", "ORIGINAL", "PRIMARY"),
    ("fundus", "77.1.5.6", "OP"),  # wide field, with the place of each pixel in the eye beside it
    ("OCT", "77.1.5.4", "OPT"),
    ("OCT", "77.1.5.4", "OCT"),
    ("OCT", "14.1", "IVOCT"),
    ("pathology", "77.1.2", "GM"),
    ("pathology", "77.1.3", "SM"),
    ("endoscopy", "77.1.1", "ES"),
    ("clinical photography", "77.1.4", "XC"),
    ("clinical photography", "77.1.7", "DMS"),
]


@pytest.mark.parametrize("case", IMAGES, ids=str)
def test_images_get_their_modality(case):
    name, *rest = case
    modality = resolve(name)
    planes = ("auto",) if name in ("CT", "MR", "PET") else ("stored",)
    assert decided(*rest) == Decision(name, modality.normalisation, planes)
    assert decided(*rest, wanted=modality) == Decision(name, modality.normalisation, planes)
    assert decided(*rest, has_pixels=False).left_out == "no image"


LEFT_OUT = [
    ("secondary capture", "7", "CT", "DERIVED", "SECONDARY"),
    ("secondary capture", "7", "OT"),
    ("secondary capture", "7.4", "US"),
    ("localizer", "2", "CT", "ORIGINAL", "PRIMARY", "LOCALIZER"),
    ("localizer", "2", "CT", "ORIGINAL", "PRIMARY", "LOCALIZER", "CT_SOM5 TOP"),
    ("localizer", "4.1", "MR", "ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"),
    ("screenshot", "2", "CT", "DERIVED", "SECONDARY", "SCREEN SAVE"),
    ("screenshot", "4", "MR", "DERIVED", "SECONDARY", "OTHER", "CSA REPORT"),
    ("dose report", "7", "CT", "DERIVED", "SECONDARY", "DOSE_INFO"),
    ("dose report", "88.67", "SR"),
    ("structured report", "88.33", "SR"),
    ("structured report", "", "SR"),
    ("key object selection", "88.59", "KO"),
    ("encapsulated document", "104.1", "DOC"),
    ("presentation state", "11.1", "PR"),
    ("waveform", "9.1.1", "ECG"),
    ("segmentation", "66.4", "SEG"),
    ("segmentation", "", "SEG"),
    ("radiotherapy object", "481.2", "RTDOSE"),
    ("radiotherapy object", "481.3", "RTSTRUCT"),
    ("radiotherapy object", "481.5", "RTPLAN"),
    ("no image", "4.2", "MR"),
    ("no image", "66.1", "REG"),
    ("derived map", "30", "MR"),
    ("derived map", "4", "MR", "DERIVED", "PRIMARY", "DIFFUSION", "ADC", "ND"),
    ("derived map", "4", "MR", "DERIVED", "PRIMARY", "DIFFUSION", "FA", "ND"),
    ("derived map", "4", "MR", "ORIGINAL", "PRIMARY", "P", "ND"),
    ("derived map", "4", "MR", "ORIGINAL", "PRIMARY", "PHASE MAP", "P", "FFE"),
    ("derived map", "4.1", "MR", "DERIVED", "PRIMARY", "PERFUSION", "RCBV"),
    ("derived map", "2", "CT", "DERIVED", "SECONDARY", "AXIAL", "SUBTRACTION"),
    ("projection", "4", "MR", "DERIVED", "SECONDARY", "PROJECTION IMAGE", "CSA MIP"),
    ("projection", "2", "CT", "DERIVED", "SECONDARY", "MIP"),
    ("rendering", "2", "CT", "DERIVED", "SECONDARY", "VRT"),
    ("rendering", "4.3", "MR"),
    ("for processing", "1.1.1", "DX"),
    ("for processing", "1.2.1", "MG"),
    ("whole slide", "77.1.6", "SM"),
    ("unknown modality", "20", "NM"),
    ("unknown modality", "", "NM"),
    ("unknown modality", "481.1", "RTIMAGE"),
    ("unknown modality", "", "OT"),
    ("unknown modality", "", ""),
    ("unknown modality", "13.1.1", "XA"),
    ("unknown modality", "501.1", "CT"),
    ("contradictory header", "4", "CT", *AXIAL),
    ("contradictory header", "2", "MR"),
    ("contradictory header", "2", "PT"),
    ("contradictory header", "2", "OT"),
    ("contradictory header", "77.1.4", "ES"),
    ("contradictory header", "6.1", "CR"),
]


@pytest.mark.parametrize("case", LEFT_OUT, ids=str)
def test_what_is_no_image_of_a_modality_is_left_out_by_name(case):
    reason, *rest = case
    decision = decided(*rest)
    assert (decision.left_out, decision.modality, decision.normalisation) == (reason, "", "")
    assert decision.detail


@pytest.mark.parametrize(
    ("reason", "kind", "modality", "elements"),
    [
        ("rendering", "2", "CT", {"PhotometricInterpretation": "RGB"}),
        ("rendering", "4", "MR", {"PhotometricInterpretation": "PALETTE COLOR"}),
        ("rendering", "1.1", "DX", {"PhotometricInterpretation": "YBR_FULL_422"}),
        ("", "6.1", "US", {"PhotometricInterpretation": "RGB"}),
        ("", "1", "CR", {"PhotometricInterpretation": "MONOCHROME1"}),
        ("derived map", "2", "CT", {"RescaleType": "MGML"}),
        ("", "2", "CT", {"RescaleType": "HU"}),
        ("derived map", "4.1", "MR", {"ComplexImageComponent": "PHASE"}),
        ("derived map", "4.1", "MR", {"ComplexImageComponent": "MIXED"}),
        ("", "4.1", "MR", {"ComplexImageComponent": "MAGNITUDE"}),
        ("projection", "2.1", "CT", {"VolumeBasedCalculationTechnique": "MAX_IP"}),
        ("", "2.1", "CT", {"VolumeBasedCalculationTechnique": "MPR"}),
        ("projection", "128", "PT", {"SeriesType": ["WHOLE BODY", "REPROJECTION"]}),
        ("", "128", "PT", {"SeriesType": ["WHOLE BODY", "IMAGE"]}),
        ("for processing", "1.2", "MG", {"PresentationIntentType": "FOR PROCESSING"}),
        ("", "1.2", "MG", {"PresentationIntentType": "FOR PRESENTATION"}),
        ("secondary capture", "", "CT", {"ConversionType": "WSD"}),
        ("", "2", "CT", {"ConversionType": "DV"}),  # digitised, and a CT image by its class all the same
        ("unknown modality", "77.1.5.1", "OP", {"BodyPartExamined": "ANTERIOR CHAMBER"}),
        ("", "77.1.5.1", "OP", {"BodyPartExamined": "EYE"}),
    ],
)
def test_other_elements_decide_too(reason, kind, modality, elements):
    assert decided(kind, modality, **elements).left_out == reason


@pytest.mark.parametrize(
    ("reason", "kind", "modality", "image_type", "description"),
    [
        ("localizer", "4", "MR", ("ORIGINAL", "PRIMARY", "M", "ND"), "localizer_BH"),
        ("localizer", "4", "MR", ("ORIGINAL", "PRIMARY", "M", "ND"), "AAHead_Scout"),
        ("localizer", "4", "MR", ("ORIGINAL", "PRIMARY", "M", "ND"), "3-plane loc"),
        ("localizer", "4", "MR", ("ORIGINAL", "PRIMARY", "M_FFE", "M"), "Survey_SHC"),
        ("localizer", "2", "CT", AXIAL, "Topogram  0.6  T20f"),
        ("", "2", "CT", AXIAL, "Bone survey low dose"),
        ("", "1", "CR", ("ORIGINAL", "PRIMARY"), "Leg scanogram"),
        ("localizer", "4", "MR", ("ORIGINAL", "PRIMARY", "M"), "pilot 3 ejes"),
        ("dose report", "2", "CT", ("DERIVED", "SECONDARY", "OTHER"), "Dose Report"),
        ("dose report", "2", "CT", ("DERIVED", "SECONDARY", "OTHER"), "Patient Protocol"),
        ("", "2", "CT", AXIAL, "Thorax low dose"),
        ("derived map", "4", "MR", ("DERIVED", "SECONDARY", "OTHER"), "ADC (10^-6 mm2/s)"),
        ("derived map", "4", "MR", ("DERIVED", "SECONDARY"), "Apparent Diffusion Coefficient"),
        ("", "4", "MR", ("ORIGINAL", "PRIMARY", "DIFFUSION", "NONE"), "ep2d_diff_b1000 ADC"),
        ("", "4", "MR", ("DERIVED", "PRIMARY", "DIFFUSION", "TRACEW"), "DWI ADC_TRACEW"),
        ("projection", "4", "MR", ("DERIVED", "SECONDARY", "OTHER"), "TOF MIP cor"),
        ("", "2", "CT", AXIAL, "Abdomen MIP protocol"),
        ("screenshot", "6.1", "US", ("DERIVED", "SECONDARY"), "Screen Save"),
        ("", "2", "CT", AXIAL, "SNAPSHOT SEGMENT 75%"),
        ("", "2", "CT", AXIAL, "Scouten, Mary"),  # whole words alone
    ],
)
def test_the_series_description_is_searched_for_words(reason, kind, modality, image_type, description):
    assert decided(kind, modality, *image_type, SeriesDescription=description).left_out == reason


def test_a_header_that_says_another_modality_than_the_user_is_left_out():
    decision = decided("2", "CT", *AXIAL, wanted=resolve("MRI"))
    assert decision == Decision(left_out="another modality", detail="the header says CT, not MR")
    assert decided("128", "PT", wanted=resolve("pet", "suv")) == Decision("PET", "suv", ("auto",))
    assert decided("7", "CT", wanted=resolve("CT")).left_out == "secondary capture"
    assert decided("4", "CT", wanted=resolve("CT")).left_out == "contradictory header"
    assert decided("20", "NM", wanted=resolve("CT")).left_out == "unknown modality"


def test_a_modality_of_ones_own_takes_what_no_header_names():
    own = resolve("scintigraphy", "display")
    assert decided("20", "NM", wanted=own) == Decision("scintigraphy", "display", ("stored",))
    assert decided("2", "CT", *AXIAL, wanted=own).left_out == "another modality"
    assert decided("88.33", "SR", wanted=own).left_out == "structured report"
    assert decided("4", "CT", wanted=own).left_out == "contradictory header"


def test_a_header_that_says_nothing_takes_the_modality_of_the_user():
    for modality in ("", "OT"):
        assert decided("", modality).left_out == "unknown modality"
        assert decided("", modality, wanted=resolve("CT")) == Decision("CT", "ct", ("auto",))
        assert decided("", modality, has_pixels=False, wanted=resolve("CT")).left_out == "no image"
    assert decided("", "NM", wanted=resolve("CT")).left_out == "unknown modality"


def test_every_storage_class_of_the_standard_is_decided_on():
    classes = [uid for uid, (_, kind, *_) in UID_dictionary.items() if kind == "SOP Class" and uid.startswith(ROOT)]
    assert len(classes) > 150
    alone = {uid: decide(Facts(sop_class=uid)) for uid in classes}
    assert {decision.modality for decision in alone.values() if not decision.left_out} == set(NAMES)
    for uid, decision in alone.items():
        name = UID_dictionary[uid][0]
        if re.search("Image|Photography|US Volume", name) is None:
            assert decision.left_out or "Retired" in UID_dictionary[uid][3], name


REAL = {
    "CT_small.dcm": ("CT", ""),
    "693_J2KI.dcm": ("CT", ""),
    "MR_small.dcm": ("MR", ""),
    "examples_overlay.dcm": ("MR", ""),
    "examples_palette.dcm": ("ultrasound", ""),
    "examples_ybr_color.dcm": ("ultrasound", ""),
    "SC_rgb_rle.dcm": ("", "secondary capture"),
    "liver_1frame.dcm": ("", "segmentation"),
    "rtdose_1frame.dcm": ("", "radiotherapy object"),
    "rtplan.dcm": ("", "radiotherapy object"),
    "rtstruct.dcm": ("", "radiotherapy object"),
    "reportsi.dcm": ("", "structured report"),
    "test-SR.dcm": ("", "structured report"),
    "waveform_ecg.dcm": ("", "waveform"),
}


@pytest.mark.parametrize("name", REAL)
def test_real_headers(name):
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip("not among the files that pydicom brings")
    head = pydicom.dcmread(path, stop_before_pixels=True, force=True)
    decision = decide(facts_of(head, "Rows" in head))
    assert (decision.modality, decision.left_out) == REAL[name]


def test_every_rule_has_a_name_a_reason_and_a_source():
    assert {rule.reason for rule in RULES} | {"another modality"} == set(REASONS)
    assert all(rule.detail and rule.source for rule in RULES)
    assert len({(rule.detail, rule.source) for rule in RULES}) > len(RULES) // 2


WORDS = sorted({part for case in IMAGES + LEFT_OUT for part in case[1:]}) + [
    "MIP",
    "RGB",
    "FOR PROCESSING",
    "scout",
    "",
]
KEYWORDS = (
    "SOPClassUID Modality ImageType PhotometricInterpretation BodyPartExamined SeriesDescription RescaleType "
    "PresentationIntentType ConversionType ComplexImageComponent VolumeBasedCalculationTechnique SeriesType "
    "SharedFunctionalGroupsSequence"
).split()
values = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from([ROOT + word for word in WORDS]),
    st.text(max_size=12),
    st.binary(max_size=4),
    st.integers(),
    st.floats(),
    st.none(),
    st.lists(st.one_of(st.sampled_from(WORDS), st.none(), st.integers(), st.text(max_size=4)), max_size=5),
    st.lists(st.dictionaries(st.just("PixelValueTransformationSequence"), st.lists(st.just({}))), max_size=2),
)
headers = st.dictionaries(st.sampled_from(KEYWORDS), values)


class Faulty:
    """A header whose every value is damaged."""

    def get(self, keyword):
        raise ValueError(keyword)


class Nameless:
    def __str__(self):
        raise ValueError


@settings(max_examples=500, deadline=None)
@given(headers, st.booleans(), st.sampled_from([None, *map(resolve, NAMES), resolve("thermography", "mr")]))
def test_any_header_ends_in_a_modality_or_a_named_reason(head, has_pixels, wanted):
    decision = decide(facts_of(head, has_pixels), wanted)
    assert (decision.left_out in REASONS) != (decision.modality != "" and decision.normalisation in NORMALISATIONS)
    assert decision == decide(facts_of(head, has_pixels), wanted)
    if not decision.left_out:
        assert has_pixels and decision.planes
        # never one modality where SOP class and Modality name two
        alone = [decide(Facts(sop_class=facts_of(head).sop_class)), decide(Facts(modality=facts_of(head).modality))]
        named = {one.modality for one in alone if one.modality}
        assert named <= {decision.modality}


@given(st.text(max_size=60), st.sampled_from(IMAGES + LEFT_OUT))
def test_no_value_of_a_header_gets_into_a_decision(text, case):
    plain = decided(*case[1:])
    secret = decided(*case[1:], SeriesDescription=text, BodyPartExamined=text, StudyDescription=text)
    details = {rule.detail for rule in RULES} | {""}
    assert secret.detail in details and secret.modality in (plain.modality, "")
    assert text not in repr(facts_of(header(*case[1:], SeriesDescription=text))) or text in "Facts(...)"


def test_a_damaged_header_raises_nothing():
    assert decide(facts_of(Faulty())).left_out == "unknown modality"
    assert decide(facts_of({"Modality": Nameless(), "ImageType": [Nameless()]})).left_out == "unknown modality"
    assert decide(facts_of(None)).left_out == "unknown modality"
