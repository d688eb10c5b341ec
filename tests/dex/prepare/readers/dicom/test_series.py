"""Files to stacks: order in space, series and phases apart, what the numbers are."""

import numpy as np
import pytest
from dicom_files import AXIAL, read, slice_of, stored, write
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    EncapsulatedPDFStorage,
    EnhancedMRImageStorage,
    JPEG2000Lossless,
    MRImageStorage,
    RTDoseStorage,
    SegmentationStorage,
)

from dex.prepare import modalities, readers, routing
from dex.prepare.readers import Refused


def test_a_series_is_ordered_by_position_and_rescaled_per_file(tmp_path):
    # names, instance numbers and positions each say another order
    for name, number, z, slope in (("a", 1, 10.0, 1), ("b", 3, 0.0, 2), ("c", 2, 5.0, 3)):
        slice_of(
            tmp_path / f"{name}.dcm",
            np.full((4, 6), z, np.int16),
            z,
            InstanceNumber=number,
            RescaleSlope=slope,
            RescaleIntercept=-100,
        )
    (stack,) = read(*sorted(tmp_path.iterdir()))
    assert (stack.quantity, stack.volume, stack.length, stack.patient) == ("HU", True, 3, "id-7")
    frames = list(stack.frames(("axial",), 1))
    assert [frame.label for frame in frames] == ["axial-000", "axial-001", "axial-002"]
    assert [frame.pixels[0, 0] for frame in frames] == [0 * 2 - 100, 5 * 3 - 100, 10 * 1 - 100]
    assert frames[0].pixels.dtype == np.float32 and frames[0].spacing == (2.0, 3.0)
    everything = np.concatenate([frame.pixels.ravel() for frame in frames])
    assert stack.percentiles(10, 90) == pytest.approx(np.percentile(everything, (10, 90)))
    sagittal = next(iter(stack.frames(("sagittal",), 1)))
    assert sagittal.spacing == (5.0, 2.0) and sagittal.pixels[:, 0].tolist() == [-90, -85, -100]  # head up
    assert [frame.label for frame in stack.frames(("axial", "sagittal"), 2)] == [
        "axial-000",
        "axial-002",
        "sagittal-000",
        "sagittal-002",
        "sagittal-004",
    ]


def test_without_positions_the_instance_number_orders_then_the_name(tmp_path):
    for name, number in (("a", 3), ("b", 1), ("c", 2)):
        write(
            tmp_path / f"{name}.dcm",
            np.full((4, 4), number, np.int16),
            kind=MRImageStorage,
            Modality="MR",
            InstanceNumber=number,
        )
    (stack,) = read(*sorted(tmp_path.iterdir()))
    assert [int(pixels[0, 0]) for pixels in stored(stack)] == [1, 2, 3] and stack.geometry is None and stack.volume
    for name, value in (("a", 7), ("b", 8)):
        write(tmp_path / f"{name}.dcm", np.full((4, 4), value, np.int16), kind=MRImageStorage, Modality="MR")
    (stack,) = read(tmp_path / "b.dcm", tmp_path / "a.dcm")
    assert [int(pixels[0, 0]) for pixels in stored(stack)] == [7, 8]


@pytest.mark.parametrize(
    "orientation, normal, plane",
    [
        ([1, 0, 0, 0, 1, 0], (0, 0, 1), "axial"),
        ([-1, 0, 0, 0, 1, 0], (0, 0, -1), "axial"),
        ([0, 1, 0, 0, 0, -1], (-1, 0, 0), "sagittal"),
        ([1, 0, 0, 0, 0, -1], (0, 1, 0), "coronal"),
    ],
)
def test_any_orientation_is_shown_as_a_radiologist_sees_it(tmp_path, orientation, normal, plane):
    """Each pixel's number says where in the patient it is; the shown slice must have right on the left, front up."""
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    assert np.array_equal(np.cross(row, column), normal)
    size = 5
    for k in range(size):
        origin = np.array(normal) * k
        i, j = np.meshgrid(np.arange(size), np.arange(size))
        place = origin + i[..., None] * row + j[..., None] * column  # left, posterior, superior
        code = (place + 10) @ np.array([400, 20, 1])
        slice_of(
            tmp_path / f"{k}.dcm",
            code.astype(np.int16),
            0,
            ImagePositionPatient=[float(v) for v in origin],
            ImageOrientationPatient=[float(v) for v in orientation],
            PixelSpacing=[1, 1],
            RescaleIntercept=0,
        )
    (stack,) = read(*sorted(tmp_path.iterdir()))
    step = {"axial": (20, 400), "coronal": (-1, 400), "sagittal": (-1, 20)}  # down the rows, along the columns
    for shown in ("axial", "coronal", "sagittal"):
        frames = [frame.pixels for frame in stack.frames((shown,), 1)]
        assert len(frames) == size
        for frame in frames:
            assert (np.diff(frame, axis=0) == step[shown][0]).all(), shown
            assert (np.diff(frame, axis=1) == step[shown][1]).all(), shown
        towards = {"axial": 1, "coronal": -20, "sagittal": -400}[
            shown
        ]  # from feet to head, back to front, left to right
        assert (np.diff([frame[0, 0] for frame in frames]) == towards).all()
    assert stack.geometry.axes.index(2) == {"sagittal": 0, "coronal": 1, "axial": 2}[plane]


def test_series_in_one_folder_are_separate_and_sorted(tmp_path):
    for series in ("1.9", "1.10", "1.2"):
        for z in range(2):
            slice_of(tmp_path / f"{series}-{z}.dcm", np.full((4, 4), z, np.int16), z, SeriesInstanceUID=series)
    stacks = read(*sorted(tmp_path.iterdir(), reverse=True))
    assert [stack.series for stack in stacks] == ["1.10", "1.2", "1.9"] and {s.length for s in stacks} == {2}
    assert {stack.study for stack in stacks} == {"1.2"}  # of which study it is keeps a visit together


def test_one_uid_for_the_series_of_two_patients(tmp_path):
    for patient in range(2):
        for z in range(3):
            pixels = np.full((4, 6), 10 * patient + z, np.int16)
            slice_of(tmp_path / f"{z}{patient}.dcm", pixels, z, PatientID=f"P{patient}", RescaleIntercept=0)
    stacks = read(*sorted(tmp_path.iterdir()))
    assert [stack.patient for stack in stacks] == ["P0", "P1"]
    assert [[frame[0, 0] for frame in stored(stack)] for stack in stacks] == [[0, 1, 2], [10, 11, 12]]


def test_jitter_of_a_header_splits_no_volume(tmp_path):
    """0.005 is where rounding to 0.01 turns."""
    for z in range(6):
        lean = 0.005 + 1e-4 * (z % 2)
        elements = {"ImageOrientationPatient": [1, lean, 0, -lean, 1, 0], "PixelSpacing": [0.5 + 1e-6 * (z % 2), 0.5]}
        slice_of(tmp_path / f"{z}.dcm", np.full((4, 6), z, np.int16), z, RescaleIntercept=0, **elements)
    (stack,) = read(*sorted(tmp_path.iterdir()))
    assert stack.geometry.even and [frame[0, 0] for frame in stored(stack)] == [0, 1, 2, 3, 4, 5]
    for z, turn in enumerate((0, 0, 0.02, 0.02)):  # of which this is none
        lean = 0.005 + turn
        elements = {"ImageOrientationPatient": [1, lean, 0, -lean, 1, 0]}
        slice_of(tmp_path / f"{z}.dcm", np.full((4, 6), z, np.int16), z, RescaleIntercept=0, **elements)
    stacks = read(*sorted(tmp_path.iterdir())[:4])
    assert sorted([frame[0, 0] for frame in stored(stack)] for stack in stacks) == [[0, 1], [2, 3]]


def test_a_scout_is_not_mixed_into_the_volume(tmp_path):
    for z in range(3):
        slice_of(tmp_path / f"{z}.dcm", np.full((4, 4), z, np.int16), z, ImageType=["ORIGINAL", "PRIMARY", "AXIAL"])
    for name, orientation in (("front", [1, 0, 0, 0, 0, -1]), ("side", [0, 1, 0, 0, 0, -1])):
        slice_of(
            tmp_path / f"{name}.dcm",
            np.full((4, 4), 9, np.int16),
            1.5,
            ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
            ImageOrientationPatient=orientation,
        )
    volume, scout = sorted(read(*sorted(tmp_path.iterdir())), key=lambda stack: -stack.length)
    assert volume.length == 3 and volume.quantity == "HU" and volume.volume
    assert scout.length == 2 and scout.quantity == "raw" and not scout.volume and "localizer" in scout.note
    assert volume.series != scout.series


def test_other_sizes_are_another_stack(tmp_path):
    for z in range(4):
        slice_of(tmp_path / f"{z}.dcm", np.full((4, 4 + z % 2), z, np.int16), z)
    stacks = read(*sorted(tmp_path.iterdir()))
    assert sorted((stack.shape, stack.length) for stack in stacks) == [((4, 4), 2), ((4, 5), 2)]
    assert len({stack.series for stack in stacks}) == 2


def test_positions_that_recur_are_phases(tmp_path):
    for phase in range(2):
        for z in range(3):
            slice_of(
                tmp_path / f"{z}{phase}.dcm",
                np.full((4, 4), 10 * phase + z, np.int16),
                z,
                AcquisitionNumber=2 - phase,
                InstanceNumber=z,
                RescaleIntercept=0,
            )
    stacks = read(*sorted(tmp_path.iterdir()))
    assert [[int(p[0, 0]) for p in stored(stack)] for stack in stacks] == [[10, 11, 12], [0, 1, 2]]


def test_the_same_instance_twice_is_left_out_once(tmp_path):
    for z in range(2):
        slice_of(tmp_path / f"{z}.dcm", np.full((4, 4), z, np.int16), z)
    (tmp_path / "copy.dcm").write_bytes((tmp_path / "0.dcm").read_bytes())
    (stack,) = read(*sorted(tmp_path.iterdir()))
    assert stack.length == 2 and [error.reason for error in stack.refused] == ["inconsistent"]


def test_one_instance_uid_of_several_images_loses_none(tmp_path):
    """Careless anonymisers: the pixels tell copies from images."""
    for n in range(4):
        write(tmp_path / f"{n}.dcm", np.full((4, 4), n % 3, np.int16), SOPInstanceUID="1.2.3", Modality="CR")
    (stack,) = read(*sorted(tmp_path.iterdir()))
    assert sorted(int(frame[0, 0]) for frame in stored(stack)) == [0, 1, 2]
    assert [(error.reason, error.file) for error in stack.refused] == [("inconsistent", "3.dcm")]


def test_uneven_spacing_shows_only_what_was_acquired(tmp_path):
    for z in (0, 1, 2, 7):
        slice_of(tmp_path / f"{z}.dcm", np.full((4, 4), z, np.int16), z)
    (stack,) = read(*sorted(tmp_path.iterdir()))
    assert len(list(stack.frames(("axial", "coronal"), 1))) == 4 and "unevenly" in str(stack.refused[0])
    with pytest.raises(Refused, match="unevenly"):
        list(stack.frames(("coronal",), 1))


def test_a_tilted_gantry_shows_only_what_was_acquired(tmp_path):
    for z in range(4):
        slice_of(tmp_path / f"{z}.dcm", np.full((4, 4), z, np.int16), 0, ImagePositionPatient=[0, 0.3 * z, z])
    (stack,) = read(*sorted(tmp_path.iterdir()))
    assert not stack.geometry.even and len(list(stack.frames(("axial",), 1))) == 4


def test_a_broken_file_refuses_its_series_only(tmp_path):
    for series in ("1.1", "1.2", "1.3"):
        for z in range(3):
            pixels = np.full((64, 64), z, np.int16)
            slice_of(tmp_path / f"{series}-{z}.dcm", pixels, z, SeriesInstanceUID=series)
    whole = (tmp_path / "1.1-1.dcm").read_bytes()
    (tmp_path / "1.1-1.dcm").write_bytes(whole[:-1000])
    jpeg = encapsulate([b"\xff\xd8 this is no image \xff\xd9"])
    slice_of(
        tmp_path / "1.3-1.dcm",
        np.zeros((64, 64), np.int16),
        1,
        SeriesInstanceUID="1.3",
        syntax=JPEG2000Lossless,
        data=jpeg,
    )
    (tmp_path / "rubbish.dcm").write_bytes(b"rubbish" * 100)
    good, broken = read(*sorted(tmp_path.iterdir()))
    assert (good.series, broken.series) == ("1.2", "1.3") and len(stored(good)) == 3
    assert [error.reason for error in good.refused] == ["unreadable", "unreadable", "inconsistent"]
    assert good.refused[2].detail.startswith("2 slices of a series") and good.refused[1].file == "rubbish.dcm"
    with pytest.raises(Refused) as caught:  # what is not seen before it is decoded
        stored(broken)
    assert caught.value.reason == "unreadable"
    with pytest.raises(Refused) as caught:  # a unit that gives nothing says all the same what became of each file
        read(*sorted(tmp_path.glob("1.1-*")), tmp_path / "rubbish.dcm")
    assert [one.file for one in (caught.value, *caught.value.others)] == ["1.1-1.dcm", "rubbish.dcm", ""]


def test_a_tomogram_of_nuclear_medicine(tmp_path):
    detector = Dataset()
    detector.ImagePositionPatient, detector.ImageOrientationPatient = [0, 0, 5], AXIAL
    pixels = np.arange(4, dtype=np.uint16)[:, None, None] + np.zeros((4, 6, 6), np.uint16)
    path = write(
        tmp_path / "a.dcm",
        pixels,
        Modality="NM",
        ImageType=["ORIGINAL", "PRIMARY", "RECON TOMO", "EMISSION"],
        DetectorInformationSequence=Sequence([detector]),
        SpacingBetweenSlices=4.0,
        PixelSpacing=[2, 2],
    )
    (stack,) = read(path)
    assert stack.volume and stack.geometry.spacing == (2, 2, 4)
    assert [frame.pixels[0, 0] for frame in stack.frames(("axial",), 1)] == [0, 1, 2, 3]


def test_objects_that_are_no_image(tmp_path):
    cases = (
        write(tmp_path / "a.dcm", None, kind=EncapsulatedPDFStorage, Modality="DOC"),
        write(tmp_path / "b.dcm", np.zeros((4, 4), np.int16), kind=RTDoseStorage, Modality="RTDOSE"),
        write(tmp_path / "c.dcm", np.zeros((4, 4), np.uint8), kind=SegmentationStorage, Modality="SEG"),
    )
    for path in cases:
        with pytest.raises(Refused) as caught:
            read(path)
        assert caught.value.reason == "no image"
    slice_of(tmp_path / "d.dcm", np.zeros((4, 4), np.int16), 0)
    (stack,) = read(*sorted(tmp_path.iterdir()))
    assert [error.reason for error in stack.refused] == ["no image"] * 3


def test_burned_in_is_flagged(tmp_path):
    slice_of(tmp_path / "a.dcm", np.zeros((4, 4), np.int16), 0, BurnedInAnnotation="NO")
    slice_of(tmp_path / "b.dcm", np.zeros((4, 4), np.int16), 1, BurnedInAnnotation="YES")
    assert not read(tmp_path / "a.dcm")[0].burned_in
    assert read(tmp_path / "a.dcm", tmp_path / "b.dcm")[0].burned_in


def test_what_is_hounsfield(tmp_path):
    pixels = np.full((4, 4), 100, np.int16)
    cases = {
        "HU": {"RescaleSlope": 2, "RescaleIntercept": -50},
        "raw": {},  # a CT without rescale
    }
    for quantity, elements in cases.items():
        (stack,) = read(write(tmp_path / f"{quantity}.dcm", pixels, **elements))
        assert stack.quantity == quantity and stored(stack)[0][0, 0] == (150 if quantity == "HU" else 100)
    (stack,) = read(write(tmp_path / "type.dcm", pixels, RescaleSlope=1, RescaleIntercept=0, RescaleType="HU_MOD"))
    assert stack.quantity == "raw"
    (stack,) = read(write(tmp_path / "mr.dcm", pixels, Modality="MR", RescaleSlope=2, RescaleIntercept=5))
    assert stack.quantity == "raw" and stored(stack)[0][0, 0] == 205


def test_enhanced_multiframe(tmp_path):
    """Frames in a wrong order, each with a position, a rescale and a phase of its own."""
    frames, groups = [], []
    for phase, z in ((1, 2), (0, 0), (1, 0), (0, 2), (1, 1), (0, 1)):
        frames.append(np.full((4, 4), 10 * phase + z, np.uint16))
        group = Dataset()
        group.PlanePositionSequence = Sequence([Dataset()])
        group.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 4.0 * z]
        group.PixelValueTransformationSequence = Sequence([Dataset()])
        group.PixelValueTransformationSequence[0].RescaleSlope = 2 + z
        group.PixelValueTransformationSequence[0].RescaleIntercept = 1
        group.FrameContentSequence = Sequence([Dataset()])
        group.FrameContentSequence[0].TemporalPositionIndex = phase + 1
        groups.append(group)
    shared = Dataset()
    shared.PlaneOrientationSequence = Sequence([Dataset()])
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = AXIAL
    shared.PixelMeasuresSequence = Sequence([Dataset()])
    shared.PixelMeasuresSequence[0].PixelSpacing = [1.5, 0.5]
    path = write(
        tmp_path / "a.dcm",
        np.stack(frames),
        kind=EnhancedMRImageStorage,
        Modality="MR",
        SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence(groups),
    )
    first, second = read(path)
    for phase, stack in enumerate((first, second)):
        shown = list(stack.frames(("axial",), 1))
        assert [frame.pixels[0, 0] for frame in shown] == [(10 * phase + z) * (2 + z) + 1 for z in range(3)]
        assert stack.geometry.spacing == (0.5, 1.5, 4.0) and shown[0].spacing == (1.5, 0.5)
    path = write(
        tmp_path / "b.dcm",
        np.stack(frames),
        kind=EnhancedMRImageStorage,
        Modality="MR",
        PerFrameFunctionalGroupsSequence=Sequence(groups[:4]),
    )
    with pytest.raises(Refused, match="functional groups"):
        read(path)


def test_a_film_of_one_place_is_no_volume(tmp_path):
    for number in range(4):
        slice_of(
            tmp_path / f"{number}.dcm", np.full((4, 4), number, np.uint8), 0, Modality="US", InstanceNumber=-number
        )
    (stack,) = read(*sorted(tmp_path.iterdir()))
    assert [int(pixels[0, 0]) + 1024 for pixels in stored(stack)] == [3, 2, 1, 0]
    assert stack.geometry is None and not stack.volume


def test_aspect_ratio_and_unknown_spacing(tmp_path):
    pixels = np.zeros((4, 4), np.uint8)
    (stack,) = read(write(tmp_path / "a.dcm", pixels, Modality="US", PixelAspectRatio=[2, 1], PixelSpacing=[0, 0]))
    assert stack.spacing == (2, 1)
    assert read(write(tmp_path / "b.dcm", pixels, Modality="US"))[0].spacing == (1, 1)


def decided(*files, wanted=None):
    def decide(head, has_pixels):
        return routing.decide(routing.facts_of(head, has_pixels), wanted)

    return list(readers.read(list(files), "dicom", decide=decide))


def test_what_is_left_out_leaves_its_series_whole(tmp_path):
    pixels = np.arange(16, dtype=np.int16).reshape(4, 4)
    axial = ["ORIGINAL", "PRIMARY", "AXIAL"]
    files = [slice_of(tmp_path / f"{z}.dcm", pixels + z, z, ImageType=axial) for z in range(3)]
    files.append(slice_of(tmp_path / "l.dcm", pixels, 9, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    files.append(write(tmp_path / "s.dcm", pixels.astype(np.uint8), kind="1.2.840.10008.5.1.4.1.1.7"))
    files.append(write(tmp_path / "m.dcm", pixels, Modality="MR", SeriesDescription="Canary^Patient"))
    (stack,) = decided(*files)
    assert (stack.length, stack.quantity, stack.volume) == (3, "HU", True)
    assert stack.decision == routing.Decision("CT", "ct", ("auto",))
    assert sorted((one.reason, one.file) for one in stack.refused) == [
        ("contradictory header", "m.dcm"),
        ("localizer", "l.dcm"),
        ("secondary capture", "s.dcm"),
    ]
    assert not any("Canary" in repr(one.args) + str(one) for one in stack.refused)
    assert len(read(*files)) > 1  # nobody asked


def test_a_folder_of_which_all_is_left_out_is_refused_for_every_file(tmp_path):
    pixels = np.zeros((4, 4), np.int16)
    files = [write(tmp_path / f"{n}.dcm", pixels, kind=MRImageStorage, Modality="MR") for n in range(2)]
    with pytest.raises(Refused) as caught:
        decided(*files, wanted=modalities.resolve("CT"))
    assert [one.reason for one in (caught.value, *caught.value.others)] == ["another modality"] * 2
    (stack,) = decided(files[0], wanted=modalities.resolve("MR"))
    assert stack.decision.modality == "MR"


def test_one_series_uid_of_two_modalities_makes_two_stacks(tmp_path):
    pixels = np.arange(16, dtype=np.int16).reshape(4, 4)
    files = [slice_of(tmp_path / f"{z}.dcm", pixels + z, z) for z in range(3)]
    more = {"kind": MRImageStorage, "Modality": "MR"}
    files += [slice_of(tmp_path / f"m{z}.dcm", pixels + z, z, **more) for z in range(2)]
    assert [(stack.decision.modality, stack.length) for stack in decided(*files)] == [("CT", 3), ("MR", 2)]


def echoes(folder, missing=(), keyword="EchoNumbers", values=(1, 2), places=5):
    """Slices of two echoes (b-values, ...) of one series; slice z of echo e holds 100 e + z."""
    files = []
    for e, value in enumerate(values):
        for z in range(places):
            if (e, z) not in missing:
                kind = {"kind": MRImageStorage, "Modality": "MR", "RescaleIntercept": 0}
                pixels = np.full((4, 4), 100 * e + z, np.int16)
                more = {keyword: value, "InstanceNumber": len(files)}
                files.append(slice_of(folder / f"{e}-{z}.dcm", pixels, z, **kind, **more))
    return files


def shown(stack):
    return [int(frame.pixels[0, 0]) for frame in stack.frames(("stored",), 1)]


@pytest.mark.parametrize(
    ("keyword", "values"),
    [
        ("EchoNumbers", (1, 2)),
        ("EchoTime", (2.5, 4.9)),
        ("DiffusionBValue", (0.0, 1000.0)),
        ("TemporalPositionIdentifier", (1, 2)),
    ],
)
@pytest.mark.parametrize(
    "missing", [(), ((0, 2),), ((1, 0), (1, 4)), ((0, 2), (1, 2)), ((1, 0), (1, 1), (1, 2), (1, 3))]
)
def test_stacks_never_mix_echoes_b_values_and_times(tmp_path, keyword, values, missing):
    stacks = read(*echoes(tmp_path, missing, keyword, values))
    expected = [[100 * e + z for z in range(5) if (e, z) not in missing] for e in (0, 1)]
    assert sorted(map(shown, stacks)) == expected


def test_times_of_each_slice_tell_nothing_apart(tmp_path):
    """Trigger times and acquisitions that differ from slice to slice of one volume."""
    files = []
    for phase in (0, 1):
        for z in range(4):
            more = {"TriggerTime": 40.0 * phase + z, "AcquisitionNumber": 1 + 10 * phase + z, "RescaleIntercept": 0}
            pixels = np.full((4, 4), 100 * phase + z, np.int16)
            kind = {"kind": MRImageStorage, "Modality": "MR"}
            files.append(slice_of(tmp_path / f"{phase}-{z}.dcm", pixels, z, **kind, **more))
    assert list(map(shown, read(*files))) == [[0, 1, 2, 3], [100, 101, 102, 103]]
    assert list(map(shown, read(*files[:4]))) == [[0, 1, 2, 3]]


def test_projections_of_one_series_are_images_of_their_own(tmp_path):
    pixels = np.arange(16, dtype=np.uint16).reshape(4, 4)
    kind = {"Modality": "DX", "kind": "1.2.840.10008.5.1.4.1.1.1.1", "stored": 12}
    files = [write(tmp_path / f"{n}.dcm", pixels * (n + 1), InstanceNumber=n, **kind) for n in range(3)]
    (stack,) = read(*files)
    assert (stack.parts, stack.volume, stack.length) == ((0, 1, 2), False, 3)
    assert [stack.percentiles(0, 100, part) for part in range(3)] == [(0, 15), (0, 30), (0, 45)]
    (film,) = read(write(tmp_path / "f.dcm", np.stack([pixels, pixels * 2]), **kind))
    assert film.parts == () and film.percentiles(0, 100) == (0, 30)  # frames of one file are one


def test_images_of_one_series_are_inverted_each_by_its_own_header(tmp_path):
    pixels = np.arange(16, dtype=np.uint16).reshape(4, 4)
    kind = {"Modality": "DX", "kind": "1.2.840.10008.5.1.4.1.1.1.1", "stored": 12}
    said = [{}, {"PresentationLUTShape": "INVERSE"}, {"PhotometricInterpretation": "MONOCHROME1"}, {}]
    files = [write(tmp_path / f"{n}.dcm", pixels * (n + 1), InstanceNumber=n, **kind, **said[n]) for n in range(4)]
    stacks = read(*files)
    inverted = {  # by the smallest number but 0
        int(frame.pixels[0, 1]) - 1: stack.inverted for stack in stacks for frame in stack.frames(("stored",), 1)
    }
    assert inverted == {0: False, 1: True, 2: True, 3: False}
