"""Parquet and ArrayRecord files: what is read, and what is said of files that cannot be."""

import struct

import numpy as np
import pytest
from source_checks import assert_rows_are_as_described, everything, needs

from jaxdist.config.errors import UserError
from jaxdist.data.grain_files import ArrayRecords, parquet, write_array_record


@needs("pyarrow", "grain")
def test_parquet_columns_become_fields_over_several_files(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    x = np.random.default_rng(0).random((6, 4)).astype(np.float32)
    for part, name in ((slice(0, 4), "a"), (slice(4, 6), "b")):
        columns = {"pixels": list(x[part]), "label": np.arange(6)[part], "other": ["s"] * len(x[part])}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    source = parquet([str(tmp_path / "*.parquet")], "pixels", "label", None, None)
    np.testing.assert_array_equal(everything(source)["x"], x)
    assert everything(source)["y"].tolist() == list(range(6))
    assert_rows_are_as_described(source)
    with pytest.raises(UserError, match=r"a\.parquet has no column labels; it has pixels, label, other"):
        parquet([str(tmp_path / "*.parquet")], "pixels", "labels", None, None)


@needs("pyarrow", "grain")
def test_parquet_token_lists_become_tokens_and_ragged_ones_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"ids": [[1, 2, 3], [4, 5, 6]]}), tmp_path / "even.parquet")
    source = parquet([str(tmp_path / "even.parquet")], None, None, "ids", None)
    assert source.vocabulary == 7
    assert everything(source)["tokens"].tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(UserError, match=r"token 6 is outside data\.vocabulary 5"):
        parquet([str(tmp_path / "even.parquet")], None, None, "ids", 5)
    pq.write_table(pa.table({"ids": [[1, 2, 3], [4]]}), tmp_path / "ragged.parquet")
    with pytest.raises(UserError, match=r"ragged\.parquet: column 'ids' is not numbers or lists of one length"):
        parquet([str(tmp_path / "ragged.parquet")], None, None, "ids", None)


@needs("pyarrow", "grain")
@pytest.mark.parametrize("content", [b"", b"hello", b"PAR1" + b"x" * 100 + b"PAR1"])
def test_a_file_that_is_no_parquet_is_named(tmp_path, content):
    (tmp_path / "bad.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*bad\.parquet as Parquet"):
        parquet([str(tmp_path / "bad.parquet")], "x", "y", None, None)


def write_records(directory):
    rows = [{"x": np.full((2, 3), i, np.float32), "y": np.int64(i % 4)} for i in range(10)]
    write_array_record(directory / "a.array_record", rows[:6])
    write_array_record(directory / "b.array_record", rows[6:])
    return [str(directory / "*.array_record")]


@needs("grain", "grain")
def test_array_records_are_read_at_random_over_several_files(tmp_path):
    source = ArrayRecords(write_records(tmp_path), classes=4)
    assert len(source) == 10
    assert_rows_are_as_described(source)
    rows = source.get(np.array([9, 0, 6, 5]))
    assert rows["x"][:, 0, 0].tolist() == [9, 0, 6, 5]
    assert rows["y"].tolist() == [1, 0, 2, 1]
    assert rows["y"].dtype == np.int32


@needs("grain", "grain")
def test_labels_in_array_records_need_their_number(tmp_path):
    with pytest.raises(UserError, match=r"set data\.classes"):
        ArrayRecords(write_records(tmp_path))


@needs("grain", "grain")
def test_a_damaged_array_record_file_is_named(tmp_path):
    patterns = write_records(tmp_path)
    good = (tmp_path / "b.array_record").read_bytes()
    for content in (b"hello", good[:70_000]):
        (tmp_path / "b.array_record").write_bytes(content)
        with pytest.raises(UserError, match=r"b\.array_record is not a whole ArrayRecord file"):
            ArrayRecords(patterns, classes=4)


@needs("grain", "grain")
def test_records_of_another_encoding_say_how_to_decode_them(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "raw.array_record"), "group_size:1")
    writer.write(struct.pack("<3f", 1, 2, 3))
    writer.close()
    patterns = [str(tmp_path / "raw.array_record")]
    with pytest.raises(UserError, match=r"does not decode .* set data\.decode"):
        ArrayRecords(patterns)
    source = ArrayRecords(patterns, decode=lambda record: {"x": np.frombuffer(record, np.float32)})
    assert everything(source)["x"].tolist() == [[1, 2, 3]]
