import numpy as np
import pytest
import torch

from dex.inference import tables
from dex.inference.collection import Row
from dex.inference.embed import Embedding

ROWS = [Row("a/1", "p1", "CT", "axial-000", ""), Row("a/2", "p2", "", "image", "blank")]


def embedding(n=2):
    generator = torch.Generator().manual_seed(0)
    cls, patches, layer, gates = (torch.rand(n, d, generator=generator) for d in (4, 4, 4, 2))
    return Embedding(cls, patches, {3: layer}, [gates], [torch.tensor([[1, 0], [2, 3]], dtype=torch.int32)[:n]])


def test_columns_are_named_after_what_they_hold():
    made = tables.columns(embedding())
    assert list(made) == ["cls", "patches", "layer_03", "experts_00", "gates_00"]
    assert made["experts_00"].dtype == np.int32 and np.array_equal(made["layer_03"], embedding().layers[3].numpy())


def test_an_archive_is_read_without_pickle(tmp_path):
    tables.write_npz(tmp_path / "a.npz", ROWS, embedding())
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert archive["id"].tolist() == ["a/1", "a/2"] and archive["dropped"].tolist() == ["", "blank"]
        assert np.array_equal(archive["cls"], embedding().cls.numpy())


@pytest.mark.parametrize("n", [2, 0])
def test_parquet_holds_rows_and_lists(tmp_path, n):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow, of the extra 'adapt'")
    tables.write_parquet(tmp_path / "a.parquet", ROWS[:n], embedding(n))
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table.num_rows == tables.count_rows(tmp_path / "a.parquet") == n
    assert str(table.schema.field("cls").type) == "fixed_size_list<element: float>[4]"
    assert table["group"].to_pylist() == ["p1", "p2"][:n]
    assert table["experts_00"].to_pylist() == [[1, 0], [2, 3]][:n]
