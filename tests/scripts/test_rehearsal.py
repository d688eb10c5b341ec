"""The rehearsal of the published corpus, on a small index, and the page of its results."""

import json

import pytest
import rehearsal
import rehearsal_page
import rehearsal_run
import rehearsal_set

from dex.data import open_dataset


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A set with a two-thousandth of each source's images, and its counts."""
    root = tmp_path_factory.mktemp("a rehearsal, é") / "set"
    return root, rehearsal_set.write(root, rehearsal_set.corpus(), 0.0005)


def test_the_corpus_is_the_published_one():
    sources = rehearsal_set.corpus()
    assert len(sources) == 44 and sum(source.images for source in sources) == 4_973_080
    assert len({source.name for source in sources}) == 44 and len({source.modality for source in sources}) == 10


def test_the_set_is_whole_but_for_its_bytes(small):
    root, counts = small
    dataset = open_dataset(root)
    train, held_out = dataset.split("train"), dataset.split("val")
    assert (len(train), len(held_out)) == (counts["train"], counts["held_out"]) and len(held_out) == 440
    ids = [dataset.sample_id(index) for index in range(len(dataset))]
    assert len(set(ids)) == len(ids) and len({name.partition("/")[0] for name in ids}) == 44
    assert {name: train.modality_counts()[name] for name in counts["modalities"]} == counts["modalities"]
    for index in range(0, len(dataset), 499):
        assert dataset[index].image.shape == (3, 256, 256)


def test_order_and_resume(small):
    root, counts = small
    result = rehearsal.ordering(root)
    assert [(row["fewest"], row["most"]) for row in result["rows"][:3]] == [(1, 1)] * 3
    assert sum(result["sources"].values()) == counts["train"] and len(result["sources"]) == 44
    resumed = rehearsal.resuming(root)
    for name, batch in (("published-code", 896), ("paper", 448)):
        row = resumed["presets"][name]
        assert (row["batch"], row["steps"]) == (batch, 200 * (counts["train"] // batch))
        assert row["differing"] == 0 and row["images"] == len(row["resumed_at"]) * rehearsal.BATCHES * batch
    epoch = resumed["epoch"]
    assert epoch["once"] == counts["train"] - epoch["left"] and epoch["never"] == epoch["left"]


def test_a_resume_elsewhere_is_noticed(small, monkeypatch):
    from dex.data import loader

    data = rehearsal.unread(open_dataset(small[0]).split("train"))
    right = loader.Loader

    def shifted(*arguments, start_batch, **words):  # Ranks that resume a batch too late
        return right(*arguments, start_batch=start_batch + ("rank" in words), **words)

    assert rehearsal.compare(data, 64, 5)["differing"] == 0
    monkeypatch.setattr(loader, "Loader", shifted)
    assert rehearsal.compare(data, 64, 5)["differing"] > 500


def test_loading(small, monkeypatch):
    monkeypatch.setattr(rehearsal, "WORKERS", (0, 1))
    monkeypatch.setattr(rehearsal, "PUBLISHED_BATCH", 64)
    result = rehearsal.loading(small[0])
    assert result["batch"] == 8 and result["image"] > result["besides"] > 0
    assert [len(row["of_workers"]) for row in result["rows"]] == [0, 1]
    assert 0 < result["rows"][1]["of_workers"][0]["own"] < result["rows"][1]["of_workers"][0]["resident"]


@pytest.mark.slow
def test_the_whole_rehearsal_goes_on_where_it_stopped(tmp_path, monkeypatch):
    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rehearsal, "in_own_process", lambda part, root: part(root))
    monkeypatch.setattr(rehearsal, "WORKERS", (0, 1))
    monkeypatch.setitem(rehearsal.PARTS, "training", stopped)
    with pytest.raises(KeyboardInterrupt):
        list(rehearsal.measure(tmp_path / "work", 0.0005))
    monkeypatch.setitem(rehearsal.PARTS, "opening", stopped)  # Done already
    monkeypatch.setitem(rehearsal.PARTS, "training", rehearsal_run.training)
    results = json.loads(json.dumps(list(rehearsal.measure(tmp_path / "work", 0.0005))[-1]))
    for row in results["training"].values():
        assert row["equal"] and row["tensors"] > 100 and row["checkpoint"]["written"] > row["checkpoint"]["estimated"]
    assert {row["gpus"] for row in results["predicted"]["rows"]} == {2, 8, 64}
    assert rehearsal_page.NOT_YET not in rehearsal_page.page(results)


def test_a_failed_run_is_reported(tmp_path):
    with pytest.raises(RuntimeError, match="exit 2: .*no such thing"):
        rehearsal_run.pretrain("paper", tmp_path / "no such thing", tmp_path / "out", 1)


def test_the_page_is_that_of_the_results():
    results = json.loads(rehearsal.RESULTS.read_text(encoding="utf-8"))
    text = rehearsal_page.page(results)
    assert rehearsal.PAGE.read_text(encoding="utf-8") == text
    prose = [line for line in text.splitlines() if not line.startswith("|")]
    assert len(" ".join(prose).split()) < 700
    assert results["set"]["train"] == 4_973_080


def test_a_shared_processor_is_named():
    results = json.loads(rehearsal.RESULTS.read_text(encoding="utf-8"))
    results["opening"] |= {"seconds": 10.0, "cpu_seconds": 9.0}
    assert "Other programs" not in rehearsal_page.page(results)
    results["opening"]["seconds"] = 20.0
    assert "**Other programs ran at the same time" in rehearsal_page.page(results)


def test_what_was_not_measured_is_named():
    results = json.loads(rehearsal.RESULTS.read_text(encoding="utf-8"))
    first = {name: results[name] for name in ("date", "machine", "loads", "set", "predicted")}
    text = rehearsal_page.page(first)
    assert text.count(rehearsal_page.NOT_YET) == 3 and "cores to read" not in text


@pytest.mark.parametrize("words", [[], ["--check"], ["folder", "--page"]])
def test_usage(words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rehearsal.py", *words])
    with pytest.raises(SystemExit) as ended:
        rehearsal.main()
    assert ended.value.code == 2 and "expected either FOLDER, or --page" in capsys.readouterr().err
