"""Tensors in parts: rows are those of the whole, and what is read of a mapped file does not stay in memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from entropy_probe.checkpoints.files.pieces import FlatTensor, joined
from entropy_probe.checkpoints.files.saved import Record, read_saved
from entropy_probe.errors import InputError
from spoiled import Malicious

ROWS = [None, slice(0, 7), slice(2, 5), slice(6, 7), slice(7, 7), slice(0, 1)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("sizes", [[35], [3, 0, 11, 20, 1], [1] * 35])
def test_rows_of_flat_pieces_are_those_of_the_whole(sizes: list[int], rows: slice | None) -> None:
    whole = torch.arange(35.0).view(7, 5)
    stored = FlatTensor.of((7, 5), whole.flatten().split(sizes), mapped=False)
    assert torch.equal(stored.read(rows), whole if rows is None else whole[rows])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dim", [0, 1])
def test_rows_of_parts_along_any_dimension_are_those_of_the_whole(dim: int, rows: slice | None) -> None:
    whole = torch.arange(35.0).view(7, 5)
    stored = joined((7, 5), dim, [part.clone() for part in whole.split([4, 1] if dim else [4, 3], dim)], mapped=False)
    assert torch.equal(stored.read(rows), whole if rows is None else whole[rows])


def test_numbers_and_parts_that_do_not_add_up() -> None:
    assert FlatTensor.of((), [torch.tensor([2.5])], mapped=False).read().item() == 2.5
    for pieces in ([torch.zeros(3)], [torch.zeros(2), torch.zeros(2, dtype=torch.float64)]):
        with pytest.raises(ValueError, match="elements"):
            FlatTensor.of((2, 2), pieces, mapped=False)
    with pytest.raises(ValueError, match="a part of shape"):
        joined((4, 2), 0, [torch.zeros(2, 2), torch.zeros(4, 1)], mapped=False)
    with pytest.raises(ValueError, match="parts of shapes"):
        joined((2, 4), 1, [torch.zeros(2, 2), torch.zeros(2, 1)], mapped=False)


def _mapped_memory() -> int:
    """This process's pages of files, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))


@pytest.mark.skipif(sys.platform != "linux", reason="by /proc")
def test_pages_of_a_mapped_file_are_given_back_and_can_be_read_again(tmp_path: Path) -> None:
    whole = torch.randn(16, 1 << 20)
    torch.save({"weight": whole}, tmp_path / "saved.pt")
    saved = read_saved(tmp_path / "saved.pt", "tensors")
    assert saved.mapped
    stored = FlatTensor.of((16, 1 << 20), [saved.content["weight"]], mapped=True)
    before = _mapped_memory()
    for _ in range(2):
        assert torch.equal(stored.read(), whole)
        assert _mapped_memory() - before < whole.numel()
    # The planted bug, for the size of what is tested: pages that are kept.
    assert torch.equal(FlatTensor.of((16, 1 << 20), [saved.content["weight"]], mapped=False).read(), whole)
    assert _mapped_memory() - before > 3 * whole.numel()


def test_the_container_that_cannot_be_mapped_is_read_whole(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "saved.pt", _use_new_zipfile_serialization=False)
    saved = read_saved(tmp_path / "saved.pt", "tensors")
    assert not saved.mapped
    assert torch.equal(saved.content["weight"], torch.ones(3))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_named_and_not_run(zipped: bool, tmp_path: Path) -> None:
    torch.save({"a": Malicious(tmp_path / "planted")}, tmp_path / "saved.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"saved\.pt is not read: it names posix\.mkdir.*ran no code"):
        read_saved(tmp_path / "saved.pt", "tensors")
    assert not (tmp_path / "planted").exists()


def test_a_record_holds_what_it_was_made_with() -> None:
    record = Record(1, 2)
    record.__setstate__({"numel": 3})
    assert (record.arguments, record.state) == ((1, 2), {"numel": 3})
