"""How a page is written and checked."""

import generated


def test_a_page_is_written_or_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generated, "ROOT", tmp_path)
    page, words = tmp_path / "page.md", {"source": "results.json", "command": "scripts/page.py"}
    assert generated.settle(page, "one", check=True, **words) == 1
    assert not page.exists()
    assert capsys.readouterr().out == "page.md: does not match results.json; run scripts/page.py\n"
    assert generated.settle(page, "one", check=False, **words) == 0
    assert page.read_text() == "one"
    assert generated.settle(page, "one", check=True, **words) == 0
    assert generated.settle(page, "two", check=True, **words) == 1
    assert page.read_text() == "one" and len(list(tmp_path.iterdir())) == 1


def test_a_commit_is_named():
    assert generated.commit_of({"commit": "0123456789abcdef", "dirty": False}) == "0123456789"
    assert generated.commit_of({"commit": "0123456789abcdef", "dirty": True}) == "0123456789, changed"
    assert generated.commit_of({"commit": None, "dirty": False}) == "an unknown commit"
