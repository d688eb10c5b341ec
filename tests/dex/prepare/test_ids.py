"""Names of samples and patients: salted where private, safe where public."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from small_runs import SALT, described

from dex.prepare.ids import Names, place_of, read_salt, shared_salt


def test_private_names_are_salted_and_hold_nothing():
    names, other = Names(described(), SALT), Names(described(), SALT[::-1])
    got = names.sample("Doe^Jane/1.nii", "axial-001")
    assert got == names.sample("Doe^Jane/1.nii", "axial-001") and got.startswith("mine/") and len(got) == 5 + 32
    assert len({got, other.sample("Doe^Jane/1.nii", "axial-001"), names.sample("Doe^Jane/1.nii", "axial-002")}) == 3
    # parts are kept apart: nothing moves from one to the next unseen
    assert names.sample("a", "bc") != names.sample("ab", "c")
    for text in (got, names.unit("Doe^Jane/1.nii"), names.group("Doe^Jane/1.nii", "Jane")):
        assert "Doe" not in text and "Jane" not in text


def test_groups_keep_patients_together():
    here, there = Names(described(), SALT), Names(described(name="other"), SALT)
    assert here.group("x/1.dcm", "123456") == there.group("y/2.dcm", " 123456 ")  # the header's, over sources
    assert here.group("x/1.dcm", "123456") != here.group("x/1.dcm", "123457")
    for nobody in ("", "ANONYMOUS", "Anonymized", "0000", "unknown"):  # then the first folder, within a source
        assert here.group("x/1.dcm", nobody) == here.group("x/y/2.dcm", "") != here.group("z/1.dcm", nobody)
        assert here.group("x/1.dcm", nobody) != there.group("x/1.dcm", nobody)
    assert here.group("1.dcm", "") != here.group("2.dcm", "")
    assert here.group("1.dcm", "", alone=False) == here.group("2.dcm", "", alone=False)
    assert here.group("x/y/1.dcm", "", alone=False) == here.group("x/2.dcm", "") != here.group("z/1.dcm", "")
    below = Names(described(), SALT, common=1)
    assert below.group("data/p1/a.png", "") == below.group("data/p1/b.png", "") != below.group("data/p2/a.png", "")
    told = Names(described(patient=r"(sub-\d+)"), SALT)
    assert told.group("a/sub-01_x.nii", "77") == told.group("b/sub-01_y.nii", "78") != told.group("a/sub-02.nii", "77")
    public = Names(described(public=True), SALT)
    assert public.group("x/1.dcm", "123456") == Names(described(public=True), SALT[::-1]).group("y", "123456")
    assert "123456" not in public.group("x/1.dcm", "123456") and public.group("x/1.dcm", "") == "mine/x"


def test_folders_that_name_nobody_beside_those_of_patients_stand_for_none():
    names = Names(described(), SALT)
    case = names.folder("CT/imagesTr/case_1.nii.gz")
    assert case.by == "file" and case != names.folder("CT/imagesTr/case_2.nii.gz")
    subject = names.folder("MRI/sub-1/anat/t1.nii.gz")
    assert subject.by == "folder" and subject == names.folder("CT/sub-1/a.nii") == names.folder("sub-1/b.nii")
    assert names.folder("endoscopy/1.png").by == "file" and names.folder("p1/1.png").by == "folder"
    for fields in ({"patient": "folder"}, {"public": True}):
        names = Names(described(**fields), SALT)
        assert names.folder("CT/1.nii") == names.folder("CT/x/2.nii")


def test_public_names_are_safe_and_different():
    names = Names(described(public=True), SALT)
    keys = ["a b", "a%20b", "a\nb", 'a"<b>', "ä" * 300, "ä" * 301, "../x", "-rf"]
    got = [names.sample(key, "image") for key in keys]
    assert len(set(got)) == len(keys)
    for text in got:
        assert text.isascii() and text.isprintable() and not set(text) & set(" \"'<>&;|$`\\*?") and len(text) < 300


def test_the_place_of_a_name_is_even_and_its_own():
    places = [place_of(f"{i:032x}") / 2**64 for i in range(20000)]
    assert 0.045 < sum(place < 0.05 for place in places) / len(places) < 0.055
    assert 0 <= min(places) and max(places) < 1 and len(set(places)) == len(places)


def test_salt_is_made_once_for_the_owner_alone(tmp_path):
    first = read_salt(tmp_path)
    assert len(first) == 32 and read_salt(tmp_path) == first
    assert os.stat(tmp_path / "salt").st_mode & 0o777 == 0o600
    (tmp_path / "salt").write_bytes(first[:31])
    with pytest.raises(ValueError, match="salt: expected 32 bytes, got 31"):
        read_salt(tmp_path)
    (tmp_path / "salt").unlink()
    (tmp_path / "salt.partial").write_bytes(b"cut short")
    assert len(read_salt(tmp_path)) == 32


def test_one_salt_serves_all_processes(tmp_path):
    private = tmp_path / "set.private"
    with ThreadPoolExecutor(8) as pool:
        salts = set(pool.map(lambda _: shared_salt(private), range(8)))
    assert salts == {(private / "salt").read_bytes()} and private.stat().st_mode & 0o777 == 0o700
    (private / "salt").write_bytes(b"short")
    with pytest.raises(ValueError, match="salt: expected 32 bytes, got 5"):
        shared_salt(private)
    with pytest.raises(ValueError, match="private: expected a writable folder for the salt of ids, got .*/salt"):
        shared_salt(private / "salt")
