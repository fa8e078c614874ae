"""Object stores without a server: failures name the place, no half run is seen, no key is told, and reads are few."""

from __future__ import annotations

import json
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from support.tables import measured_files
from support.tiers import nightly
from support.warehouses import write_scores

import avss_dist
from avss_dist.core.errors import DamagedFile, WarehouseError, without_secrets
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.storage import Storage

URI = "s3://lab/w?region=us-east-1"
SIZES: dict[str, Any] = {"max_sequences": 8, "sequence_length": 16, "batch_size": 2, "sequences_per_shard": 2}


class Bucket(pafs.FSSpecHandler):  # type: ignore[misc]
    """An object store over a folder, which notes the files that are opened.

    Uploads whose path contains ``refused`` fail.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(DirFileSystem(str(folder), LocalFileSystem(auto_mkdir=True)))
        self.refused: str | None = None
        self.opened: list[str] = []

    def open_input_file(self, path: str) -> Any:
        self.opened.append(path)
        return super().open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        if self.refused is not None and self.refused in path:
            raise OSError("When completing multiple part upload: AWS Error NETWORK_CONNECTION: Could not connect")
        return super().open_output_stream(path, metadata)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The bucket that every S3 address leads to."""
    bucket, open_storage = Bucket(tmp_path / "bucket"), Storage.__init__

    def open_bucket(self: Storage, root: str | Path, **options: Any) -> None:
        open_storage(self, root, **options)
        if str(root).startswith("s3:"):
            self.filesystem = pafs.PyFileSystem(bucket)

    monkeypatch.setattr(Storage, "__init__", open_bucket)
    return bucket


@pytest.mark.parametrize(("table", "resumed"), [("runs/run_id", 4), *nightly(("shard_stats/", 0))])
def test_an_upload_that_fails_leaves_no_half_run(
    table: str, resumed: int, bucket: Bucket, tiny_llama: Path, tmp_path: Path
) -> None:
    """Readers see nothing of the run, and the next attempt completes it with the same bytes as in a folder."""
    options: dict[str, Any] = {**SIZES, "corpus": "builtin:pydoc", "executor": "local", "partition": "single"}
    bucket.refused = table
    with pytest.raises(WarehouseError, match=r"Cannot write s3://lab/w.*: Could not connect"):
        avss_dist.score(tiny_llama, warehouse=URI, **options)
    with suppress(WarehouseError):  # it may have no runs at all
        assert Warehouse(URI).runs()["status"].to_pylist() == ["failed"]
        assert Warehouse(URI).table("scores").num_rows == Warehouse(URI).table("shard_stats").num_rows == 0
    bucket.refused = None
    run = avss_dist.score(tiny_llama, warehouse=URI, **options)
    assert run.status == "done"
    assert run.resumed_shards == resumed
    avss_dist.score(tiny_llama, warehouse=tmp_path / "folder", **options)
    assert measured_files(tmp_path / "bucket" / "lab" / "w") == measured_files(tmp_path / "folder")


def test_a_file_of_a_bucket_is_read_once_and_a_part_in_place_of_many(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(cache: str) -> int:
        """Return the number of files that a reader opens, who has what it has read before in a cache."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        bucket.opened.clear()
        assert set(Warehouse(URI, snapshot=True).table("scores")["run_id"].to_pylist()) == written
        return len(bucket.opened)

    written = {f"run-{i}" for i in range(6)}
    for run_id in written:
        write_scores(URI, run_id, [1.0, 2.0, 3.0, 4.0])  # type: ignore[arg-type]
    assert [read("one"), read("one")] == [2 * 6, 0], "runs and scores, each file once"
    write_scores(URI, "run-6", [7.0, 2.0, 3.0, 4.0])  # type: ignore[arg-type]
    written.add("run-6")
    assert read("one") == 2, "the new run"
    assert Warehouse(URI).compact()["scores"] == 7
    assert [read("two"), read("two")] == [2, 0], "a part of runs, and a part of scores"


def test_a_run_is_removed_from_a_bucket_and_from_its_parts(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for run_id in ("run-1", "run-2"):
        write_scores(URI, run_id, [1.0, 2.0, 3.0, 4.0])  # type: ignore[arg-type]
    Warehouse(URI).compact()
    avss_dist.rm("run-1", warehouse=URI)
    stored = [path for path in (tmp_path / "bucket").rglob("*") if path.is_file()]
    assert [path for path in stored if path.match("compacted/*/*")], "the part of the other run"
    assert not [path for path in stored if "run-1" in str(path) or b"run-1" in path.read_bytes()]
    assert Warehouse(URI).table("scores")["run_id"].to_pylist() == ["run-2"] * 4


@pytest.mark.parametrize("uri", ["foo://x/y", "s3:/bucket/x", "hf://datasets/org/name", "mock://x", "https://x/y"])
def test_a_bad_uri_is_refused(uri: str) -> None:
    with pytest.raises(WarehouseError, match=rf"Cannot open {uri[:5]}.*\nGive a folder, or an s3://"):
        Storage(uri)


def test_keys_belong_to_a_warehouse_not_to_its_name() -> None:
    """Two users of one bucket in one process: neither takes the other's keys, and one without keys takes none."""
    first, second, none = (Storage(f"s3://{keys}bucket/w?region=x") for keys in ("ONE:1@", "TWO:2@", ""))
    assert first.root == second.root == none.root == "s3://bucket/w?region=x"
    assert not first.filesystem.equals(second.filesystem)
    assert not first.filesystem.equals(none.filesystem)
    again = Storage(pickle.loads(pickle.dumps(first.root)))
    assert again.filesystem.equals(first.filesystem)
    assert f"{first.root}" == json.loads(json.dumps({"w": first.root}))["w"] == str(none.root)


@pytest.mark.parametrize(
    ("address", "error", "damaged"),
    [
        ("abfss://c@a.dfs.core.windows.net/w", OSError("not authorized"), False),
        ("/folder", PermissionError(13, "Permission denied"), False),
        ("abfss://c@a.dfs.core.windows.net/w", pa.ArrowInvalid("no Parquet"), True),
        ("/folder", OSError("Corrupt snappy data"), True),
    ],
)
def test_only_a_damaged_file_is_to_be_measured_again(address: str, error: Exception, damaged: bool) -> None:
    with pytest.raises(WarehouseError) as caught, Storage(address).reading("w/runs"):
        raise error
    hints = (
        "Check the address, and who may read there.",
        "avss score --fresh replaces a damaged file; avss rm removes its run.",
    )
    assert caught.value.hint == hints[damaged]


def test_the_words_of_an_object_store_are_one_line_and_no_damage(tmp_path: Path) -> None:
    """Azure's own library, where there are no keys."""
    said = "Unknown error: Listing 'c' failed: N5Azure4Core11Credentials23AuthenticationExceptionE: No token.\nSee ..."
    with pytest.raises(WarehouseError) as caught, Storage(tmp_path).reading("abfss://c@a/x"):
        raise pa.ArrowException(said)
    assert not isinstance(caught.value, DamagedFile)
    assert caught.value.message == "Cannot read abfss://c@a/x: Listing 'c' failed: No token"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://KEY:SEC/RET@lab/w?region=x", "s3://lab/w?region=x"),
        ("s3://KEY:8/RET@lab/w", "s3://lab/w"),
        ("at 's3://K:S@lab' and s3://K:S@lab/w", "at 's3://lab' and s3://lab/w"),
        ("https://host/a.jsonl?X-Amz-Signature=abc&part=1", "https://host/a.jsonl?X-Amz-Signature=***&part=1"),
        ("Cannot parse 's3://K:S E C@lab'", "Cannot parse 's3://lab'"),
        ("Cannot read s3://lab: ask me@host", "Cannot read s3://lab: ask me@host"),
        ("hdfs://host:8020/w@x", "hdfs://host:8020/w@x"),
        ("/folder/a@b:c", "/folder/a@b:c"),
        ("/folder/a?key=x", "/folder/a?key=x"),
        ("org/model@main", "org/model@main"),
    ],
)
def test_only_what_is_secret_is_left_out(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert str(WarehouseError(text)) == shown
