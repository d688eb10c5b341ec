"""A public name without a type is found."""

import json
import subprocess
from types import SimpleNamespace

import public_types
import pytest


def symbol(name, *, known=True, ambiguous=False, exported=True):
    diagnostics = [] if known and not ambiguous else [{"message": "Type is missing\nmore"}]
    kind = {"isExported": exported, "isTypeKnown": known, "isTypeAmbiguous": ambiguous}
    return {"name": name, "diagnostics": diagnostics} | kind


@pytest.fixture
def answer(monkeypatch):
    """``answer(*symbols)``: what basedpyright is to say."""

    def says(*symbols):
        out = json.dumps({"typeCompleteness": {"symbols": symbols}})
        monkeypatch.setattr(subprocess, "run", lambda *args, **more: SimpleNamespace(stdout=out))

    return says


def test_what_lacks_a_type_is_named(answer):
    good, hidden = symbol("dex.good"), symbol("dex.hidden", known=False, exported=False)
    answer(good, hidden, symbol("dex.unknown", known=False), symbol("dex.vague", ambiguous=True))
    assert public_types.incomplete("dex") == ["dex.unknown: Type is missing", "dex.vague: Type is missing"]


def test_a_module_of_an_absent_package_is_left_out(answer, monkeypatch, capsys):
    answer(symbol("dex.integrations.DEXCallback", known=False), symbol("dex.other", known=False))
    for needed, lines in ((None, ["dex.other: Type is missing"]), ("here", None)):
        monkeypatch.setattr(public_types.importlib.util, "find_spec", lambda name, needed=needed: needed)
        got = public_types.incomplete("dex")
        assert got == (lines or ["dex.integrations.DEXCallback: Type is missing", "dex.other: Type is missing"])
    assert "left out: dex.integrations" in capsys.readouterr().out


def test_a_checker_that_sees_nothing_is_no_success(answer):
    answer()
    with pytest.raises(SystemExit, match="expected public names, got none"):
        public_types.incomplete("dex")


@pytest.mark.slow
def test_every_public_name_has_a_type():
    assert public_types.main() == 0
