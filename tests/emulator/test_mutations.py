"""Changes of kernel lines: how they are drawn, and that what `mutations.py` kept is complete and of today's kernels."""

import ast

import equivalent
import mutants
import mutations
import pytest

AT_LEAST = 200


@pytest.fixture(scope="module")
def results():
    kept = mutations.load()
    if not kept["changes"]:
        pytest.fail("tests/emulator/mutations.json is not of today's kernels: run python tests/emulator/mutations.py")
    return kept


def test_every_change_of_every_function_is_a_program():
    for module, file in mutants.modules().items():
        text = file.read_text()
        for function in mutants.jitted(text):
            found = list(mutants.mutants(module, text, function))
            assert found, function.name
            for mutant in found[:: max(len(found) // 10, 1)]:
                changed = mutants.apply(text, mutant.edit)
                assert changed != text
                ast.parse(changed)


def test_the_same_seed_draws_the_same_changes():
    some = mutants.draw(70, 1)
    assert some == mutants.draw(70, 1) != mutants.draw(70, 2)
    assert len({mutant.key for mutant in some}) == 70
    functions = {(m, f.name) for m, file in mutants.modules().items() for f in mutants.jitted(file.read_text())}
    assert {(mutant.module, mutant.function) for mutant in some} == functions


@pytest.mark.parametrize(
    "line, changed",
    [
        ("x = tl.load(p + i, mask=i < n, other=0.0)", "x = tl.load(p + i)"),
        ("x = tl.load(p + i, mask=i < n, other=0.0)", "x = tl.load(p + i, mask=i <= n, other=0.0)"),
        ("x = a.to(tl.int64) * b", "x = a * b"),
        ("x = tl.where(c, a, b)", "x = tl.where(c, b, a)"),
        ("x = a[:, None]", "x = a[None, :]"),
        ("x = tl.sum(a, 1)", "x = tl.sum(a, 0)"),
        ("a += b", "pass"),
        ("x = f(a, b)", "x = f(b, a)"),
    ],
)
def test_kinds_of_changes(line, changed):
    text = f"@triton.jit\ndef kernel(a, b):\n    {line}\n"
    (function,) = mutants.jitted(text)
    assert changed in {mutant.after for mutant in mutants.mutants("module", text, function)}


def test_results_are_complete(results):
    assert set(results["changes"]) == {mutant.key for mutant in mutants.draw(mutations.COUNT, mutations.SEED)}
    assert all(set(one) == set(mutations.TOOLS) for one in results["changes"].values())
    counts = mutations.count(results["changes"].values())
    assert counts.changes - counts.stillborn >= AT_LEAST


def test_every_survivor_has_its_proof_or_is_a_known_gap(results):
    assert set(mutations.survivors(results)) == set(equivalent.PROOFS) | set(equivalent.GAPS)
    assert not set(equivalent.PROOFS) & set(equivalent.GAPS) and len(equivalent.GAPS) <= 3


def test_the_page_is_that_of_the_results(results):
    assert mutations.PAGE.read_text() == mutations.page(results)
