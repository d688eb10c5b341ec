"""The study: its grid, its rows and how they survive, what is said of them; one small run of each kind of arm."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import study
import study_arms
import study_choice
import study_page
import study_run
from PIL import Image
from study_arms import MONO, Spec

ROOT = Path(__file__).parents[2]


def made(arm, seed, loss=0.5, gap=0.1, steps=400, half=None, noise=0.0):
    """A row as a run prints it, of five sources with four images each."""
    rng = np.random.default_rng(seed)
    sources = {}
    for source in "abcde":
        own = loss + noise * rng.standard_normal()
        values = {"loss": own, "other modality": gap, "same modality": gap / 2, "beyond": gap / 2}
        sources[source] = {name: 4 * value for name, value in values.items()}
        sources[source] |= {f"{name} of": 4 for name in values}
    spec = Spec(study_arms.Arm(arm), seed, steps, half)
    row = {"key": spec.key, "arm": arm, "seed": seed, "steps": steps, "half": half, "tiny": False, "finite": True}
    more = {"curve": [[20, 1.0]], "probe": [0.5, 0.4, 0.6], "cpu_s": 60.0, "training_cpu_s": 50.0}
    more |= {"sources_sha256": "5" * 64, "data": "d" * 64}
    return row | more | {"sources": sources, "information": [0.5, 0.7], "information at step 0": [0.2, 0.4]}


def keyed(*rows):
    return {row["key"]: row for row in rows}


def test_the_grid_is_the_plans():
    specs = study_arms.study()
    assert len(specs) == len({spec.key for spec in specs}) == 30 + 6 + 18 + 9
    by_arm = {
        name: sorted(s.seed for s in specs if s.arm.name == name and s.steps == 400) for name in ("cls", "align 0")
    }
    assert by_arm == {"cls": [0, 1, 2, 3, 4], "align 0": [0, 1, 2]}
    for spec in [*specs, *study_arms.search(), *study_arms.confirmation(MONO)]:
        study_run.configuration(spec)  # every field is one, of the right type
        assert study_arms.read_spec(json.loads(json.dumps(dataclasses.asdict(spec)))) == spec
    searched, confirmed = study_arms.search(), study_arms.confirmation(MONO)
    assert {s.half for s in searched} == {0} and {s.half for s in confirmed} == {1}
    assert not {s.seed for s in searched} & {s.seed for s in confirmed}


def test_equal_parameters_and_equal_computation_are_that():
    from dex.model.build import build_model

    def trained(arm):
        model = build_model(study_run.configuration(Spec(arm, 0, 400)))
        mlps = ".experts.", ".mlp."
        return sum(
            p.numel() for n, p in model.encoder.named_parameters() if p.requires_grad and any(m in n for m in mlps)
        )

    arms = {spec.arm.name: spec.arm for spec in study_arms.study()}
    experts, equal, less = (trained(arms[name]) for name in ("cls", "monolithic, equal parameters", "monolithic"))
    assert equal == pytest.approx(experts, rel=0.01) and less == pytest.approx(experts / 4, rel=0.01)


def test_effects_are_paired_and_their_intervals_hold_what_they_should():
    rows = keyed(
        *(made("cls", s, 0.45, noise=0.05) for s in range(5)),
        *(made("monolithic", s, 0.5, noise=0.05) for s in range(5)),
    )
    cls, mono = study_choice.rows_of(rows, "cls", 400), study_choice.rows_of(rows, "monolithic", 400)
    alone = study_choice.effect(cls, "loss")
    assert alone.low < alone.value < alone.high and alone.seeds == alone.sources == 5
    paired = study_choice.effect(cls, "loss", mono)
    assert paired.value == pytest.approx(-0.05) and paired.low == pytest.approx(-0.05) and paired.shown  # same noise
    null = study_choice.effect(keyed_by_seed(made("a", s, noise=0.1) for s in range(5)), "loss", keyed_by_seed(
        made("b", s + 50, noise=0.1) | {"seed": s} for s in range(5)))  # fmt: skip
    assert null.low < 0 < null.high and not null.shown
    assert study_choice.effect(cls, "random") is None and study_choice.effect({}, "loss") is None
    assert study_choice.gained_information(cls)[:3] == pytest.approx((0.3, 0.3, 0.3))
    diverged = made("cls", 9) | {"finite": False}
    assert 9 not in study_choice.rows_of(keyed(diverged), "cls", 400)


def keyed_by_seed(rows):
    return {row["seed"]: row for row in rows}


def test_the_search_chooses_by_the_rule_that_was_fixed():
    def rows(**losses):
        """Candidates by name: (loss, gap)."""
        given = {"published": (0.5, 0.1)} | {name.replace("_", " "): value for name, value in losses.items()}
        return keyed(*(made(name, s, loss, gap, half=0) for name, (loss, gap) in given.items() for s in (0, 1, 2)))

    found = rows(mean_token=(0.4, 0.1), no_noise=(0.3, -0.1), no_align=(0.6, 0.2))
    assert study_choice.choose(found, None, 400).name == "mean token"  # no gap, no choice, however low the loss
    joined = study_choice.combine(found, 400)
    assert joined.changes["model"] == {"route_from": "mean"} and joined.changes["schedule"]["noise_std"] == [0.0, 0.0]
    assert joined.changes["schedule"]["balance_weight"] == [0.01, 0.01]
    assert study_choice.choose(rows(mean_token=(0.4, -0.2), no_align=(0.6, -0.1)), None, 400).name == "no align"
    with pytest.raises(RuntimeError, match="expected candidates whose runs"):
        study_choice.choose({}, None, 400)
    assert study_choice.combine(rows(mean_token=(0.4, 0.1)), 400) is None


def test_the_page_is_made_of_the_rows_alone_and_names_all_of_them(tmp_path):
    main = ("monolithic", 0.5, 0.0), ("cls", 0.45, 0.1), ("mean", 0.55, 0.2)
    confirmed = ("mean token", 0.4), ("published", 0.5), ("monolithic", 0.5)
    rows = keyed(
        *(made(arm, s, loss, gap) for arm, loss, gap in main for s in range(5)),
        *(made("random experts", s, 0.6, 0.0) for s in range(3)),
        made("align 0", 0) | {"finite": False, "probe": None},
        *(made("mean token", s, 0.4, 0.1, half=0) for s in range(3)),
        *(made("published", s, 0.5, 0.1, half=0) for s in range(3)),
        *(
            made(arm, s, loss, 0.1, steps, half=1)
            for arm, loss in confirmed
            for s in range(10, 15)
            for steps in (400, 1100)
        ),
    )
    text = study_page.page(rows)
    control = "the loss at 400 steps minus the monolithic control's is"
    assert f"the CLS token (cls), {control} -0.0500 **[-0.0500, -0.0500]**; it is lower." in text
    assert f"the mean of the tokens (mean), {control} +0.0500" in text and "; it is higher." in text
    assert "1 did not stay finite" in text and "555555555555..." in text
    assert "With random experts the swap gap is +0.0000 [0.0000, 0.0000], which contains 0, as it must." in text
    assert "| align 0 (not finite) | 400 | 0 |" in text
    assert text.count("| 60 |") == len(rows)
    assert "Chosen by the rule: **mean token**" in text and "it is better than both." in text
    assert "the chosen one (mean token) has a lower loss than the published recipe" in text
    worse = {key: row for key, row in rows.items() if "mean token, 1100" not in key}
    assert "it is not shown to be better." in study_page.page(worse)
    study_page.figure(rows, tmp_path / "a folder" / "study.png")
    assert (tmp_path / "a folder" / "study.png").stat().st_size > 10_000
    study_page.figure(rows, tmp_path / "main.png", ("cls",))
    whole, main = (Image.open(tmp_path / name).size for name in ("a folder/study.png", "main.png"))
    assert whole[0] == main[0] and whole[1] > main[1]
    wrong = rows | keyed(*(made("random experts", s, 0.6, 0.3) for s in range(3)))
    assert "does not contain 0: the instrument is wrong" in study_page.page(wrong)


@pytest.fixture
def quick(monkeypatch):
    """Runs that print their row at once; the names of those that were started."""
    started = []

    def start(spec, data):
        started.append(spec.key)
        row = json.dumps(made(spec.arm.name, spec.seed, steps=spec.steps) | {"key": spec.key})
        code = "raise SystemExit('no')" if spec.arm.name == "align 0" and data == "broken" else f"print({row!r})"
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    monkeypatch.setattr(study, "_start", start)
    return started


def test_the_readme_takes_the_first_main_comparison():
    text = "before\n<!-- study -->\nold\n<!-- end of study -->\nafter\n"
    filled = study_page.with_headline(text, {})
    name = "- **DEX against a monolithic network of equal computation**"
    assert filled == text.replace("old", f"{name}: not measured.")
    assert study_page.with_headline(filled, {}) == filled
    with pytest.raises(ValueError, match="README: expected the line <!-- study -->"):
        study_page.with_headline("before", {})
    rows = keyed(*(made(arm, s, loss, 0.1) for arm, loss in (("monolithic", 0.5), ("cls", 0.45)) for s in range(5)))
    assert study_page.headline(rows).startswith(
        f"{name}: held-out loss -0.050 [-0.050, -0.050] in small runs of 5 seeds: DEX is better"
    )


def test_the_pages_are_what_the_rows_say():
    assert study.main(["--check"]) == 0


def test_rows_that_are_there_are_not_made_again_and_stale_ones_are(quick, tmp_path):
    specs, path = study_arms.study((4, 6), tiny=True)[:6], tmp_path / "a b" / "rüns.jsonl"
    results = study.Results(path, {"sources_sha256": "1", "data": "d"})
    study.carry_out(specs[:4], results, "x", 2, lambda text: None)
    with pytest.raises(ValueError, match="expected no other process to use"):
        study.Results(path, {})
    results.close()
    path.write_text(path.read_text() + '{"key": "cut sho')  # as a kill would leave it, were it written in place
    results = study.Results(path, {"sources_sha256": "1", "data": "d"})
    study.carry_out(specs, results, "x", 2, lambda text: None)
    assert sorted(quick) == sorted(spec.key for spec in specs)
    results.close()
    assert set(study.read(path)) == {spec.key for spec in specs}
    changed = study.Results(path, {"sources_sha256": "2", "data": "d"})
    study.carry_out(specs[:1], changed, "x", 2, lambda text: None)
    changed.close()
    assert quick.count(specs[0].key) == 2 and study.read(path)[specs[0].key]["sources_sha256"] == "2"


def test_a_run_that_fails_is_named_and_the_others_are_kept(quick, tmp_path):
    specs = [spec for spec in study_arms.study((4, 6), tiny=True) if spec.arm.name in ("cls", "align 0")]
    results = study.Results(tmp_path / "runs.jsonl", {})
    with pytest.raises(RuntimeError, match="align 0, 4 steps, seed 0, tiny: exit code 1: no"):
        study.carry_out(specs, results, "broken", 1, lambda text: None)
    assert results.rows and all(row["arm"] == "cls" for row in results.rows.values())


def test_wrong_usage_is_told(tmp_path, capsys):
    assert study.main(["nowhere", "--results", str(tmp_path / "r.jsonl")]) == 2
    assert capsys.readouterr().err.startswith("study: path: expected ")
    with pytest.raises(SystemExit):
        study.main(["embedded", "--workers", "0", "--results", str(tmp_path / "r.jsonl")])
    assert "--workers: expected at least 1, got 0" in capsys.readouterr().err
    assert study.main(["--page", "--results", str(tmp_path / "r.jsonl")]) == 1
    assert "got none; run make study" in capsys.readouterr().out


def test_halves_share_no_source_and_are_whole_sets():
    from dex.data import open_dataset

    dataset = open_dataset()
    halves = [study_run.half_of(dataset, half) for half in (0, 1)]
    names = [{study_run.source_of(h.sample_id(i)) for i in range(len(h))} for h in halves]
    assert not names[0] & names[1] and sum(map(len, halves)) == len(dataset)
    for half in halves:
        assert len(half.split("train")) + len(half.split("val")) == len(half) and len(half.split("val")) > 0
        assert len(half.modality_counts()) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cls", "monolithic", "upcycled", "token-wise", "random experts", "K from 4"])
def test_a_small_run_of_each_kind(name):
    arms = {spec.arm.name: spec.arm for spec in [*study_arms.study(), *study_arms.search()]}
    row = study_run.row_of(Spec(arms[name], 0, 3, tiny=True), None)
    json.loads(json.dumps(row, allow_nan=False))
    assert row["finite"] and len(row["sources"]) > 5 and len(row["curve"]) == 3
    columns = set().union(*row["sources"].values())
    routed = name not in ("monolithic", "token-wise")
    assert ("other modality" in columns) == ("beyond" in columns) == bool(row["information"]) == routed
    if name == "random experts":
        gap = study_choice.effect({0: row}, "other modality")
        assert gap.low < 0 < gap.high


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_every_row_once(tmp_path):
    path = tmp_path / "runs.jsonl"
    command = [sys.executable, str(ROOT / "scripts/study.py"), "embedded", "--tiny", "--results", str(path)]
    command += ["--only", "cls, 4 steps, seed", "--shuffle", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 300
    while not study.read(path):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = study.read(path)
    assert subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, timeout=600).returncode == 0
    after = study.read(path)
    assert len(after) == 5 and all(after[key] == row for key, row in before.items())
