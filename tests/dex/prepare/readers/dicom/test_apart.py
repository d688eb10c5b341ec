"""Series with several slices at each place: no stack mixes two of their phases, whatever is missing."""

from typing import NamedTuple

import numpy as np
import pydicom
import pytest
from dicom_files import AXIAL, read, slice_of, write
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedMRImageStorage, MRImageStorage

from dex.prepare.readers.dicom import apart

PLACES, PHASES = 5, 3
MISSING = [(), ((2, 1),), ((0, 0),), ((4, 1), (3, 2)), ((0, 1), (1, 0))]
"""(place, phase) of slices that are not there."""
B_VALUES = (0, 500, 1000)


def number(place, phase):
    return 100 * phase + place


def series(folder, elements, missing=(), order="phase", private=lambda place, phase: (), names=lambda n: n):
    """Slice z of phase p holds 100 p + z. elements: keyword -> value of (z, p)."""
    kind = {"kind": MRImageStorage, "Modality": "MR", "RescaleIntercept": 0}
    both = [(z, p) for p in range(PHASES) for z in range(PLACES)]
    taken = both if order == "phase" else sorted(both)
    files = []
    for n, (z, p) in enumerate(taken):
        if (z, p) in missing:
            continue
        more = {"InstanceNumber": n + 1} | {keyword: value(z, p) for keyword, value in elements.items()}
        pixels = np.full((4, 4), number(z, p), np.int16)
        path = slice_of(folder / f"{names(n):03d}.dcm", pixels, 3.0 * z, **kind, **more)
        for group, creator, element, representation, value in private(z, p):
            _add_private(path, group, creator, element, representation, value)
        files.append(path)
    return sorted(files)


def _add_private(path, group, creator, element, representation, value):
    data = pydicom.dcmread(path)
    data.private_block(group, creator, create=True).add_new(element, representation, value)
    data.save_as(path)


def shown(stack):
    return [int(frame.pixels[0, 0]) for frame in stack.frames(("stored",), 1)]


def expected(missing):
    return [[number(z, p) for z in range(PLACES) if (z, p) not in missing] for p in range(PHASES)]


CLOCK = {
    "AcquisitionTime": lambda z, p: f"1200{p:02d}",
    "ContentTime": lambda z, p: f"1200{p:02d}.5",
    "AcquisitionDateTime": lambda z, p: f"202002281200{p:02d}",
}
SAID = CLOCK | {
    "TriggerTime": lambda z, p: 40.0 * p,
    "NominalCardiacTriggerDelayTime": lambda z, p: 40.0 * p,
    "NominalPercentageOfCardiacPhase": lambda z, p: 10.0 * p,
    "FrameReferenceTime": lambda z, p: 500.0 + 1000 * p,
    "AcquisitionNumber": lambda z, p: p + 1,
    "SeriesNumber": lambda z, p: p + 1,
    "SeriesDescription": lambda z, p: ("T1", "T2", "FLAIR")[p],
    "ImageType": lambda z, p: ["DERIVED", "PRIMARY", ("F", "M", "W")[p]],
    "SequenceName": lambda z, p: f"*ep_b{B_VALUES[p]}",
    "InversionTime": lambda z, p: 50.0 + 100 * p,
    "FlipAngle": lambda z, p: 2.0 + 4 * p,
    "RepetitionTime": lambda z, p: 500.0 + 500 * p,
    "EchoTime": lambda z, p: 5 + 10 * p + 0.001 * z,  # as it was measured
    "DiffusionBValue": lambda z, p: 1000.0 * p + 3 * z,
    "KVP": lambda z, p: 80.0 + 20 * p,
    "ConvolutionKernel": lambda z, p: "ABC"[p],
    "ContrastBolusAgent": lambda z, p: ("", "Gd", "Gd 2")[p],
    "DiffusionGradientOrientation": lambda z, p: [float(p == axis) for axis in range(3)],
}


@pytest.mark.parametrize("missing", MISSING[3:])
@pytest.mark.parametrize("keyword", SAID)
def test_what_a_header_says_tells_phases_apart(tmp_path, keyword, missing):
    """Slice by slice, so that neither number nor name does."""
    files = series(tmp_path, {keyword: SAID[keyword]}, missing, order="place", names=lambda n: n * 7 % 15)
    assert sorted(map(shown, read(*files))) == expected(missing)


@pytest.mark.parametrize(
    "private",
    [
        lambda z, p: [(0x0019, "SIEMENS MR HEADER", 0x0C, "IS", str(B_VALUES[p]))],
        lambda z, p: [(0x0043, "GEMS_PARM_01", 0x39, "IS", [str(10**9 + B_VALUES[p]), "8", "0", "0"])],
        lambda z, p: [(0x2001, "Philips Imaging DD 001", 0x03, "FL", float(B_VALUES[p]))],
    ],
)
def test_manufacturers_b_values(tmp_path, private):
    files = series(tmp_path, {}, ((2, 1),), order="place", private=private)
    assert sorted(map(shown, read(*files))) == expected(((2, 1),))


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize(
    ("elements", "order"),
    [
        ({"TriggerTime": lambda z, p: (40 + z) * p + 0.5 * z}, "place"),  # each breath-hold has its own heart rate
        ({"AcquisitionTime": lambda z, p: f"12{p:02d}{z:02d}"}, "phase"),  # slice by slice
        ({"AcquisitionTime": lambda z, p: f"1200{10 * p + 2 * z:02d}.250000"}, "phase"),  # and no pause
        ({"ContentTime": lambda z, p: f"12:{p:02d}:{z:02d}"}, "phase"),
        ({}, "phase"),  # by their number
        ({"InstanceNumber": lambda z, p: 0}, "phase"),  # by the files' names
        ({"TriggerTime": lambda z, p: 40.0 * p, "AcquisitionNumber": lambda z, p: z + 1}, "place"),
    ],
)
def test_phases_by_when_they_were_taken(tmp_path, elements, order, missing):
    assert sorted(map(shown, read(*series(tmp_path, elements, missing, order)))) == expected(missing)


@pytest.mark.parametrize(
    ("elements", "names"), [({}, lambda n: n), ({"InstanceNumber": lambda z, p: 0}, lambda n: n * 7 % 15)]
)
def test_what_nothing_tells_apart_is_shown_image_by_image(tmp_path, elements, names):
    """Place by place or in no order, and one is missing: any may be of any phase."""
    (stack,) = read(*series(tmp_path, elements, ((2, 1),), "place", names=names))
    assert stack.length == 14 and stack.parts == tuple(range(14)) and stack.geometry is None
    assert sorted(shown(stack)) == sorted(sum(expected(((2, 1),)), []))
    for part, value in enumerate(shown(stack)):
        assert stack.percentiles(0, 100, part) == (value, value)


def test_phases_of_each_place_in_turn(tmp_path):
    assert sorted(map(shown, read(*series(tmp_path, {}, order="place")))) == expected(())


def test_a_second_try_leaves_the_first_whole(tmp_path):
    """Two places have two slices each that nothing tells apart; the others are a volume."""
    missing = [(z, p) for z in range(PLACES) for p in (1, 2)][:-4] + [(3, 2), (4, 2)]
    elements = {"InstanceNumber": lambda z, p: 0}
    order = [3, 13, 9, 0, 12, 6, 10]  # of 3 * place + phase: a sequence from end to end leads nowhere
    volume, single = read(*series(tmp_path, elements, missing, "place", names=order.index))
    assert shown(volume) == [0, 1, 2] and volume.geometry is not None and not volume.parts
    assert sorted(shown(single)) == [3, 4, 103, 104] and single.parts == (0, 1, 2, 3)


def test_copies_under_other_names_are_left_out(tmp_path):
    files = series(tmp_path, {}, [(z, p) for z in range(PLACES) for p in (1, 2)])
    for n, z in enumerate((1, 3)):
        pixels = np.full((4, 4), number(z, 0), np.int16)
        kind = {"kind": MRImageStorage, "Modality": "MR", "RescaleIntercept": 0}
        files.append(slice_of(tmp_path / f"again-{z}.dcm", pixels, 3.0 * z, InstanceNumber=20 + n, **kind))
    (stack,) = read(*files)
    assert shown(stack) == [0, 1, 2, 3, 4] and stack.geometry.even
    assert [(one.reason, one.file) for one in stack.refused] == [
        ("inconsistent", "again-1.dcm"),
        ("inconsistent", "again-3.dcm"),
    ]


@pytest.mark.parametrize(
    "elements",
    [
        {"AcquisitionNumber": lambda z, p: z + 1},
        {"AcquisitionTime": lambda z, p: f"12000{z}"},
        {"AcquisitionTime": lambda z, p: f"12000{z % 2}"},  # two packages
        {"RepetitionTime": lambda z, p: 500.0 + 100 * z},
        {"EchoTime": lambda z, p: 5.0 + 10 * z},
        {"KVP": lambda z, p: 80.0 + 20 * (z > 2)},
        {"SliceThickness": lambda z, p: 1.0 + (z > 2)},
    ],
)
def test_what_differs_between_the_slices_of_one_volume_parts_none(tmp_path, elements):
    missing = [(z, p) for z in range(PLACES) for p in (1, 2)]
    (stack,) = read(*series(tmp_path, elements, missing))
    assert shown(stack) == [0, 1, 2, 3, 4] and not stack.parts and stack.geometry.even


def test_the_echoes_of_one_place_share_no_percentiles(tmp_path):
    files = [path for path in series(tmp_path, {"EchoTime": lambda z, p: 5.0 + 10 * p}, order="place")][:PHASES]
    (stack,) = read(*files)
    assert shown(stack) == [0, 100, 200] and stack.parts == (0, 1, 2)


@pytest.mark.parametrize("located", [True, False])
def test_without_positions(tmp_path, located):
    nowhere = {"ImagePositionPatient": lambda z, p: None}
    if located:
        nowhere["SliceLocation"] = lambda z, p: 3.0 * z
    elements = nowhere | {"EchoTime": lambda z, p: 5.0 + 10 * p}
    missing = ((2, 1),)
    stacks = read(*series(tmp_path, elements, missing, "place"))
    assert sorted(map(shown, stacks)) == expected(missing) and all(stack.geometry is None for stack in stacks)
    one = [(z, p) for z in range(PLACES) for p in (1, 2)]
    (tmp_path / "b").mkdir()
    order = {"InstanceNumber": lambda z, p: 0} if located else {}
    names = (lambda n: n * 7 % 15) if located else (lambda n: n)
    (stack,) = read(*series(tmp_path / "b", nowhere | order, one, names=names))
    assert shown(stack) == [0, 1, 2, 3, 4] and not stack.parts


class Frame(NamedTuple):
    sequence: str
    keyword: str
    value: object


FRAMES = [
    Frame("MREchoSequence", "EffectiveEchoTime", lambda z, p: 5.0 + 5 * p),
    Frame("MRDiffusionSequence", "DiffusionBValue", lambda z, p: float(B_VALUES[p])),
    Frame("FrameContentSequence", "TemporalPositionIndex", lambda z, p: p + 1),
    Frame("FrameContentSequence", "FrameAcquisitionNumber", lambda z, p: p + 1),
    Frame("FrameContentSequence", "FrameAcquisitionDateTime", lambda z, p: f"2020010112{p:02d}{z:02d}.5"),
    Frame("FrameContentSequence", "FrameReferenceDateTime", lambda z, p: f"2020010112{p:02d}{z:02d}"),
    Frame("FrameContentSequence", "StackID", lambda z, p: "ABC"[p]),
    Frame("FrameContentSequence", "DimensionIndexValues", lambda z, p: [1, z + 1, p + 1]),
    Frame("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime", lambda z, p: 30.0 * p),
    Frame("CardiacSynchronizationSequence", "ActualCardiacTriggerDelayTime", lambda z, p: 30.0 * p + z),
    Frame("CardiacSynchronizationSequence", "NominalPercentageOfCardiacPhase", lambda z, p: 30.0 * p),
    Frame("RespiratorySynchronizationSequence", "NominalPercentageOfRespiratoryPhase", lambda z, p: 30.0 * p),
    Frame("TemporalPositionSequence", "TemporalPositionTimeOffset", lambda z, p: 3.0 * p),
    Frame("MRImageFrameTypeSequence", "FrameType", lambda z, p: ["ORIGINAL", "PRIMARY", "VOLUME", "ABC"[p]]),
    Frame("MRModifierSequence", "InversionTimes", lambda z, p: 50.0 + 100 * p),
    Frame("MRVelocityEncodingSequence", "VelocityEncodingDirection", lambda z, p: [float(p == a) for a in range(3)]),
]


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: frame.keyword)
@pytest.mark.parametrize("missing", [((2, 1),)])
def test_frames_of_an_enhanced_file(tmp_path, frame, missing):
    frames, groups = [], []
    for z, p in ((z, p) for z in range(PLACES) for p in range(PHASES) if (z, p) not in missing):
        group = Dataset()
        for sequence, keyword, value in (
            ("PlanePositionSequence", "ImagePositionPatient", [0, 0, 3.0 * z]),
            ("PlaneOrientationSequence", "ImageOrientationPatient", AXIAL),
            (frame.sequence, frame.keyword, frame.value(z, p)),
        ):
            item = Dataset()
            setattr(item, keyword, value)
            setattr(group, sequence, Sequence([item]))
        groups.append(group)
        frames.append(np.full((4, 4), number(z, p), np.uint16))
    groups = {"PerFrameFunctionalGroupsSequence": Sequence(groups)}
    path = write(tmp_path / "a.dcm", np.stack(frames), kind=EnhancedMRImageStorage, Modality="MR", **groups)
    assert sorted(map(shown, read(path))) == expected(missing)


def test_places_along_a_line():
    assert apart.numbered([3.0, 0.0, 0.005, -4.0, 3.0], 0.01) == [2, 1, 1, 0, 2]
    assert apart.numbered([], 0.01) == []
