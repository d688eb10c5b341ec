"""Places to write to are checked before the work."""

import errno
import os

import pytest

from dex.common import folders
from dex.common.folders import check_file, check_folder, require


def test_new_and_existing_folders_pass_and_nothing_is_left(tmp_path):
    there = tmp_path / "Größe mit Leerzeichen"
    there.mkdir()
    for place in (there, there / "new" / "deep"):
        check_folder(place)
        check_file(place / "page.html")
    assert os.listdir(tmp_path) == [there.name] and not os.listdir(there)


def test_a_file_is_no_folder_and_a_folder_is_no_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="private: expected a folder, got the file .*/file$"):
            check_folder(place, "private")
    with pytest.raises(ValueError, match="out: expected a folder, got the file .*/file$"):
        check_file(tmp_path / "file" / "page.html")
    with pytest.raises(ValueError, match="out: expected a file, got the folder "):
        check_file(tmp_path)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in (tmp_path / "link", tmp_path / "link" / "below"):
        with pytest.raises(ValueError, match="out: expected a folder, got the broken link .*/link$"):
            check_folder(place)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_names_that_no_file_system_takes(tmp_path, name):
    with pytest.raises(ValueError, match="out: expected the path of a folder, got "):
        check_folder(tmp_path / name)


@pytest.mark.parametrize("place", ["/proc/x", "/proc/x/y", "/sys/x"])
def test_a_kernel_file_system_is_not_writable_even_for_root(place):
    if not os.path.isdir(os.path.dirname(place.removesuffix("/y"))):
        pytest.skip("no such file system here")
    with pytest.raises(ValueError, match="out: expected a writable folder, got /(proc|sys): "):
        check_folder(folders.Path(place))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ValueError, match="out: expected a writable folder, got .*: Permission denied"):
            check_folder(tmp_path / "new")
    finally:
        tmp_path.chmod(0o700)


def test_a_read_only_disk_is_named_with_its_reason(tmp_path, monkeypatch):
    def refuse(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(folders.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match="sheet: expected a writable folder, got .*: Read-only file system"):
        check_folder(tmp_path / "new", "sheet")


def test_what_is_read_must_be_there(tmp_path):
    assert require(tmp_path, "run: expected a run") == tmp_path == require(str(tmp_path), "run: expected a run")
    with pytest.raises(FileNotFoundError, match="^run: expected a run; nothing at .*/absent$"):
        require(tmp_path / "absent", "run: expected a run")
    for nothing in ("", None, 3):
        with pytest.raises(ValueError, match="^run: expected a run, got "):
            require(nothing, "run: expected a run")
