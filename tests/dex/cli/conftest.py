import pytest

from dex import cli


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """`dex ARGUMENTS` in an empty folder and in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capsys.readouterr()
        code = cli.main([str(a) for a in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call
