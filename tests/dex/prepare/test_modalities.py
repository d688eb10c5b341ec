import pytest
from hypothesis import given
from hypothesis import strategies as st

from dex.prepare import modalities
from dex.prepare.folders import names_nobody
from dex.prepare.modalities import (
    CATALOGUE,
    NAMES,
    NORMALISATIONS,
    known,
    of_dicom,
    of_folder,
    resolve,
    surely_of_folders,
)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *(("ct", "CT"), ("CT", "CT"), ("Computed Tomography", "CT")),
        *(("mr", "MR"), ("mri", "MR"), ("MRI", "MR")),
        *(("pt", "PET"), ("Pet", "PET")),
        *(
            ("cr", "X-ray"),
            ("DX", "X-ray"),
            ("x-ray", "X-ray"),
            ("X Ray", "X-ray"),
            ("xray", "X-ray"),
            ("X_RAY", "X-ray"),
        ),
        *(("mammography", "X-ray"), ("MG", "X-ray"), ("xa", "X-ray")),
        *(("us", "ultrasound"), ("Echo", "ultrasound"), ("ULTRASOUND", "ultrasound")),
        *(("op", "fundus"), ("opt", "OCT"), ("oct", "OCT")),
        *(("sm", "pathology"), ("Histology", "pathology"), ("es", "endoscopy")),
        *(("xc", "clinical photography"), ("photo", "clinical photography"), ("dermoscopy", "clinical photography")),
        *(("Dermatoscopy", "clinical photography"), ("clinical_photography", "clinical photography")),
    ],
)
def test_names_are_known_in_any_case_and_by_alias(text, name):
    assert known(text).name == name and resolve(text).name == name
    assert of_folder(text) == (None if text.lower() in ("dx", "es", "op", "opt", "pt", "sm", "xc") else name)


@pytest.mark.parametrize("word", ["DR", "GM", "es", "Op", "opt", "PT", "Angiography", "dx", "rf"])
def test_a_folder_may_be_called_so_for_another_reason(word):
    """A class, a tissue, a phase of the heart: the user may mean the modality, a folder's name is no proof of it."""
    assert known(word) is not None and of_folder(word) is None and names_nobody(word)


@pytest.mark.parametrize(
    "path, names",
    [
        *(("US", "ultrasound"), ("US/p1", "ultrasound"), ("p1/us", "ultrasound"), ("p1/Us", "ultrasound")),
        *(("XR", "X-ray"), ("XA/p1", "X-ray"), ("p1/cr", "X-ray"), ("MG/p1", "X-ray")),
        *(("PT", "PET"), ("p1/PT", "PET"), ("ct/p1", "CT"), ("Mr/p1", "MR"), ("oct/p1", "OCT"), ("OCT", "OCT")),
        *(("USG/p1", "ultrasound"), ("usg", "ultrasound"), ("cfp", "fundus"), ("mammography/p1/a", "X-ray")),
        *(("PET/CT", "CT PET"), ("US/p1/MR", "MR ultrasound")),
        *(("us/hospital", ""), ("us/hospital/p1", ""), ("usa/p1", ""), ("cr/p1", ""), ("mg/p1", "")),
        *(("PT/p1", ""), ("pt", ""), ("p1/pt", ""), ("DR", ""), ("GM", ""), ("OP", ""), ("ES", ""), ("DX", "")),
        *(("photos", ""), ("echo", ""), ("angiography", ""), ("", "")),
    ],
)
def test_what_folders_surely_say(path, names):
    """A word that means something else is no contradiction: a country, a patient, a class."""
    assert surely_of_folders(path.split("/")) == set(names.split())


def test_every_name_is_its_own_and_no_alias_means_two():
    aliases = [alias for modality in CATALOGUE for alias in {modalities.key(modality.name), *modality.aliases}]
    assert len(aliases) == len(set(aliases))
    assert all(alias == modalities.key(alias) for alias in aliases)
    assert [resolve(name).name for name in NAMES] == list(NAMES)


def test_the_catalogue_knows_the_rules():
    others = {m.name: m.normalisation for m in CATALOGUE if m.normalisation != "display"}
    assert others == {"CT": "ct", "MR": "mr", "PET": "pet"}
    assert [m.name for m in CATALOGUE if m.crop] == ["fundus", "pathology", "endoscopy", "clinical photography"]
    assert [m.name for m in CATALOGUE if m.min_foreground != 0.05] == ["PET"]


@pytest.mark.parametrize(
    "text", ["", " ", "ultrasond", "CTs", "auto", "from-folders", "From_Folders", "a/b", "é", "x" * 65]
)
def test_what_is_no_name_is_refused(text):
    assert known(text) is None and of_folder(text) is None
    with pytest.raises(ValueError, match="^modality: expected"):
        resolve(text)


def test_a_misspelt_name_is_told_the_closest():
    with pytest.raises(ValueError, match="did you mean 'ultrasound'"):
        resolve("ultrasond")
    for word in ("ultrasond", "ultrasounds", "ultrasoond"):
        with pytest.raises(ValueError, match="did you mean 'ultrasound'"):
            resolve(word, "display")
    with pytest.raises(ValueError, match="needs --normalisation, one of ct, mr, pet, suv, display"):
        resolve("photoacoustic")


def test_a_modality_of_ones_own_has_its_own_normalisation():
    own = resolve("  Photo  acoustic ", "mr")
    assert (own.name, own.normalisation, own.crop, own.min_foreground) == ("Photo acoustic", "mr", False, 0.05)
    assert resolve("pet", "suv") == known("PET")._replace(normalisation="suv")
    with pytest.raises(ValueError, match="^normalisation: expected one of ct, mr"):
        resolve("CT", "hounsfield")
    with pytest.raises(ValueError, match="^modality: expected"):
        resolve("auto", "mr")


def test_codes_of_dicom():
    wanted = {"CT": "CT", "pt": "PET", " DX ": "X-ray", "MG": "X-ray", "OP": "fundus", "OPT": "OCT", "XC": NAMES[-1]}
    assert {code: of_dicom(code) for code in wanted} == wanted
    assert {of_dicom(code) for code in ("", "NM", "OT", "RTIMAGE", "SEG", "SR", "XRAY", "MRI")} == {None}


@given(st.text(max_size=80), st.sampled_from([None, *NORMALISATIONS]))
def test_any_text_is_a_modality_or_a_named_error(text, normalisation):
    try:
        modality = resolve(text, normalisation)
    except ValueError as error:
        assert str(error).startswith("modality: expected")
    else:
        assert modality.name in NAMES or (normalisation is not None and known(text) is None)
        assert modality.name.isprintable() and resolve(modality.name, normalisation) == modality
