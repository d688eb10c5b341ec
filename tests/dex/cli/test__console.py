from pathlib import Path

import pytest

from dex.cli._console import Parser, check_folder, failed, folder_argument, print_line


def test_wrong_usage_is_a_value_error_and_help_ends():
    parser = Parser(prog="dex x")
    parser.add_argument("name")
    with pytest.raises(ValueError, match="the following arguments are required: name"):
        parser.parse_args([])
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help"])
    assert ended.value.code == 0


def test_an_empty_folder_is_not_the_current_one():
    assert folder_argument("out", "a b") == Path("a b")
    assert folder_argument("out", "~/set") == Path.home() / "set"
    for text in ("", " \n"):
        with pytest.raises(ValueError, match="out: expected a folder; got "):
            folder_argument("out", text)


def test_messages_are_one_line_on_stderr(capsys):
    print_line("dex x", "two\n  lines")
    assert failed("dex y", OSError(5, "I/O\nerror")) == 1
    assert capsys.readouterr() == ("", "dex x: two lines\ndex y: [Errno 5] I/O error\n")


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    check_folder(tmp_path / "new" / "deep")
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="out: expected a folder; got the file .*/file"):
            check_folder(place)
    monkeypatch.setattr("dex.cli._console.os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="out: expected a writable folder; got "):
        check_folder(tmp_path / "new")
