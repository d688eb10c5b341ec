"""The salt of ids."""

import os
from pathlib import Path

import pytest

from dex.tasks.salt import salt_of


def test_one_salt_beside_the_data_or_where_the_user_says(tmp_path):
    data = tmp_path / "my data"
    data.mkdir()
    salt = salt_of(data, None)
    assert len(salt) == 32 and salt_of(data, None) == salt
    assert (tmp_path / "my data.private/salt").stat().st_mode & 0o777 == 0o600
    assert salt_of(data, tmp_path / "other") != salt


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ValueError, match="--private DIR"):
            salt_of(tmp_path / "data", None)
    finally:
        tmp_path.chmod(0o700)


def test_a_file_where_the_folder_should_be(tmp_path):
    Path(tmp_path / "data.private").write_text("")
    with pytest.raises(ValueError, match="private: expected a writable folder"):
        salt_of(tmp_path / "data", None)
