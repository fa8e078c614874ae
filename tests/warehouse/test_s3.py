"""The warehouse in an object store: a real S3 server on the loopback, and keys that stay secret."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.checkpoints import llama
from support.command_line import as_words, avss, files, succeed
from support.distilling import SMALL
from support.families import lively
from support.rows import column
from support.s3_server import Server
from support.tables import measured_files
from support.texts import sentences

import avss_dist
from avss_dist.core.errors import WarehouseError
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import TABLES
from avss_dist.warehouse.store import Store

pytestmark = pytest.mark.nightly

SIZES: dict[str, Any] = {"max_sequences": 64, "sequence_length": 64, "batch_size": 2, "sequences_per_shard": 8}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def environment(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys as people give them; nothing of who runs the tests."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def score(model: Path, out: object, **changes: Any) -> avss_dist.Run:
    options = {**SIZES, "corpus": "builtin:pydoc", "executor": "local", "partition": "single", **changes}
    return avss_dist.score(model, warehouse=str(out), **options)


@pytest.fixture(scope="module")
def local(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The measured files of the same run in a folder."""
    out = tmp_path_factory.mktemp("local")
    assert score(tiny_llama, out).status == "done"
    return measured_files(out)


def in_folders(objects: dict[str, bytes], *folders: str) -> dict[str, bytes]:
    """Return the objects that are in folders."""
    return {path: data for path, data in objects.items() if path.startswith(folders)}


def objects_of(objects: dict[str, bytes], run: avss_dist.Run) -> dict[str, bytes]:
    """Return the objects whose path or content names a run."""
    named = {}
    for path, data in objects.items():
        if run.run_id in path or run.run_id.encode() in data:
            named[path] = data
    return named


def at_paths_of(objects: dict[str, bytes], run: avss_dist.Run) -> dict[str, bytes]:
    """Return the objects whose path names a run."""
    return {path: data for path, data in objects.items() if run.run_id in path}


def test_scores_in_a_bucket_are_the_same_bytes_and_every_command_reads_them(
    server: Server, tiny_llama: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    uri = server.uri("whole")
    assert score(tiny_llama, uri).status == "done"
    objects = server.objects("whole")
    assert in_folders(objects, "scores/", "layer_stats/") == local
    assert len(in_folders(objects, "shard_stats/")) == 8
    assert score(tiny_llama, uri).status == "skipped"

    assert "tiny-llama" in succeed("show", "-w", uri).stdout
    query = "SELECT count(DISTINCT layer) AS layers FROM scores"
    assert succeed("query", "-w", uri, query, "--format", "csv").stdout.split() == ["layers", "3"]
    succeed("show", "-w", uri, "-o", tmp_path / "layers.svg")
    assert (tmp_path / "layers.svg").read_text().startswith("<svg")


def test_a_run_is_removed_from_a_bucket(server: Server, tiny_llama: Path) -> None:
    """No object of it remains, nor an empty folder that a reader takes for a run; the other run is as it was."""
    uri = server.uri("removal")
    gone = score(tiny_llama, uri)
    stays = score(tiny_llama, uri, max_sequences=32)
    Warehouse(uri).compact()
    of_other_run = at_paths_of(server.objects("removal"), stays)
    assert of_other_run
    assert "Removed 1 run" in succeed("rm", gone.run_id, "-w", uri, "--yes").stderr
    after = server.objects("removal")
    assert at_paths_of(after, stays) == of_other_run
    assert objects_of(after, gone) == {}
    listed = server.client.list_objects_v2(Bucket="lab", Prefix="removal/")["Contents"]
    for key in column(listed, "Key"):
        assert gone.run_id not in key
    assert Warehouse(uri).runs()["run_id"].to_pylist() == [stays.run_id]
    assert Warehouse(uri).unfinished().num_rows == 0
    assert score(tiny_llama, uri).status == "done", "it can be measured again"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bucket": "no-such"}, "NO_SUCH_BUCKET"),
        ({"port": 1}, "Could not connect"),
        ({"user": "AKIAIOSFODNN7EXAMPLE:no%2Fsecret%2Fof+ours@"}, "ACCESS_DENIED|INVALID_ACCESS_KEY_ID|Access Key Id"),
    ],
    ids=["no bucket", "no server", "wrong keys"],
)
def test_storage_that_cannot_be_used_is_a_mistake_told_at_once(
    changes: dict[str, Any], says: str, server: Server, tiny_llama: Path
) -> None:
    uri = server.uri("w", **changes)
    with server.asking_for_keys():
        done = avss("score", tiny_llama, "--corpus", "builtin:pydoc", "-w", uri)
        with pytest.raises(WarehouseError) as caught:
            Store(uri).storage.create()
    assert done.exit_code == 2, done.stderr
    assert "Cannot write s3://" in done.stderr
    assert re.search(says, done.stderr)
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr
    assert "secret" not in str(caught.value)


def test_keys_in_a_uri_are_used_and_never_told(
    server: Server, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    secret = quote(server.secret, safe="")
    uri = server.uri("keys", user=f"{server.key}:{secret}@")
    with server.asking_for_keys():
        run = score(tiny_llama, uri, max_sequences=16)
    told = [repr(run), repr(Warehouse(uri).runs().to_pylist()), *capfd.readouterr()]
    assert run.warehouse == server.uri("keys")
    with server.asking_for_keys():
        assert run.scores(site="block").num_rows > 0, "the same process opens it by its name"
    with pytest.raises(WarehouseError) as caught:
        Warehouse(f"s3://{server.key}:{server.secret} @lab/keys?bogus=1").runs()
    told.append(str(caught.value))
    objects = server.objects("keys")
    for text in (server.secret, secret, server.key):
        assert text not in "\n".join(told)
        for data in objects.values():
            assert text.encode() not in data


def test_keys_of_a_corpus_reach_no_table_and_no_screen(
    server: Server, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    for key, word in (("a.txt", "word"), ("b.txt", "other")):
        text = " ".join(f"{word}{i}" for i in range(3000))
        server.client.put_object(Bucket="lab", Key=key, Body=text.encode())
    tokens = {name: f"planted-{name}" for name in ("HF_TOKEN", "RAY_AUTH_TOKEN", "HF_HUB_TOKEN", "WANDB_API_KEY")}
    for name, token in tokens.items():
        monkeypatch.setenv(name, token)
    user = f"{server.key}:{quote(server.secret, safe='')}@"
    there = server.uri("keys-of-all", user=user)
    seen = f"s3://{user}lab/a.txt"
    unseen = f"s3://{user}lab/b.txt"
    out = tmp_path / "w"
    small = {**SIZES, "max_sequences": 8, "sequences_per_shard": 4}
    options = as_words(small)
    request = {"warehouse": str(out), "models": [str(tiny_llama)], "corpora": [seen], "settings": small}
    request["experiment"] = {"tasks": [f"perplexity:{unseen}"], "random": 1, "max_sequences": 8}
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps(request))
    plan = tmp_path / "plan.yaml"
    task = ["--tasks", f"perplexity:{unseen}"]
    commands: list[list[object]] = [
        ["run", job],
        ["evaluate", tiny_llama, *task, "--warehouse", out, *options],
        ["ablate", tiny_llama, "--corpus", seen, "--warehouse", out, *options],
        ["report", "-w", out, "-o", tmp_path / "report.html"],
        ["run", job, "--dry-run"],
        ["score", tiny_llama, "--corpus", seen, "-w", there, *options],
        ["show", "-w", there],
        ["query", "-w", there, "FROM runs", "--format", "json"],
        ["plan", "-w", there, "--by", "avss", "-o", plan],
        ["evaluate", plan, *task, "--warehouse", there, "--allow-overlap", *options],
        ["prune", tiny_llama, plan, "-o", tmp_path / "pruned"],
        ["report", "-w", there, "-o", tmp_path / "there.html"],
        ["show", "-w", there, "-o", tmp_path / "there.svg"],
        ["show", "-w", there, "--format", "csv", "-o", tmp_path / "there.csv"],
    ]
    with server.asking_for_keys():
        outputs = [succeed(*command).output for command in commands]
    job.unlink()
    written = [*files(tmp_path).values(), *server.objects("keys-of-all").values()]
    assert (tmp_path / "pruned" / "README.md").is_file()
    assert len(written) > 20
    tasks = Warehouse(out).table("evaluations")["task"].to_pylist()
    assert {"perplexity:s3://lab/b.txt", "ablation:s3://lab/a.txt"} <= set(tasks)
    for secret in (server.secret, quote(server.secret, safe=""), server.key, *tokens.values()):
        assert_nowhere(secret, outputs, written, [out])


def assert_nowhere(
    secret: str, outputs: Iterable[str], written: Iterable[bytes], warehouses: Iterable[str | Path]
) -> None:
    """A text is in no output of a command, in no file, and in no table of a warehouse."""
    for output in outputs:
        assert secret not in output
    for data in written:
        assert secret.encode() not in data
    for warehouse in warehouses:
        for name in TABLES:
            assert secret not in str(Warehouse(warehouse).table(name).to_pylist()), name


def test_keys_of_texts_reach_nothing_that_commands_write_which_change_a_model(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save_checkpoint: Callable[[Any, Path], Path],
) -> None:
    """No plan, record, card, page or table. Each text of every command is at a URI with keys.

    The same keys are in the environment, with which commands read again what earlier ones have read.
    """
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    model = save_checkpoint(lively(llama(num_hidden_layers=8)), tmp_path / "models" / "deep")
    user = f"{server.key}:{quote(server.secret, safe='')}@"
    text = {}
    for seed, name in enumerate(("scored", "searched", "repaired", "trained", "watched", "heldout")):
        body = "\n".join(sentences(300, seed=seed)).encode()
        server.client.put_object(Bucket="lab", Key=f"{name}.txt", Body=body)
        text[name] = f"s3://{user}lab/{name}.txt"
    layers = list(range(8))
    values = pa.BufferOutputStream()
    pq.write_table(pa.table({"layer": layers, "mine": layers}), values)
    server.client.put_object(Bucket="lab", Key="own.parquet", Body=values.getvalue().to_pybytes())
    own = f"s3://{user}lab/own.parquet:mine"
    few = as_words({"max_sequences": 8, "sequence_length": 32, "batch_size": 4, "dtype": "float32", "device": "cpu"})
    rows = [*few, "--max-sequences", "80"]
    w = tmp_path / "w"
    out = tmp_path / "out"
    settings = {"max_sequences": 8, "sequence_length": 32, "dtype": "float32"}
    experiment = {
        "tasks": [f"perplexity:{text['heldout']}"],
        "scores": ["loss"],
        "random": 1,
        "repairs": ["channel"],
        "repair_corpora": [text["repaired"]],
        "max_sequences": 8,
    }
    job = {"warehouse": str(w), "models": [str(model)], "corpora": [text["scored"]], "settings": settings}
    job_file = tmp_path / "job.yaml"
    job_file.write_text(json.dumps({**job, "experiment": experiment}))
    held_out = ("--tasks", f"perplexity:{text['heldout']}", "-w", w, *few)
    greedy = ("--by", "greedy", "--count", "1", "--corpus", text["searched"])
    repair = ("--repair", "channel", "--repair-corpora", f"{text['repaired']}=2")
    training = as_words(SMALL | {"learning_rate": 5e-4})
    distilling = ("--teacher", model, "--corpora", text["trained"], "--watch", text["watched"], *training)
    # Training may gain nothing after a repair, as these weights are random.
    unrepaired = ("--repair", "none", "--distill-tokens", "1536")
    commands: list[list[object]] = [
        ["score", model, "--corpus", text["scored"], "--sites", "block", "--sites", "inputs", "-w", w, *few],
        ["ablate", model, "--corpus", text["searched"], "--damage", "--quantize", "int8", "-w", w, *few],
        ["plan", "--by", "loss", "-o", out / "loss.yaml", "-w", w],
        ["plan", *greedy, "-o", out / "greedy.yaml", "-w", w, *few],
        ["plan", "--by", own, "-o", out / "own.yaml", "-w", w],
        ["show", "--by", own, "-w", w, "--format", "csv", "-o", out / "own.csv"],
        ["show", "--by", own, "-w", w],
        ["findings", "--truth", "--by", own, "-w", w],
        ["sparsify", "0.5", "--method", "loss", "--corpus", text["searched"], "-o", out / "sparse.yaml", "-w", w, *few],
        ["quantize", "--bits", "9", "-o", out / "bits.yaml", "-w", w],
        ["evaluate", out / "loss.yaml", out / "bits.yaml", *held_out],
        ["evaluate", out / "greedy.yaml", "--sparse", out / "sparse.yaml", *held_out],
        ["prune", model, out / "greedy.yaml", "-o", out / "pruned", "-w", w, *repair, *rows],
        ["distill", out / "pruned", *distilling, "-o", out / "distilled"],
        [
            "shrink",
            model,
            "--by",
            "greedy",
            "--corpus",
            text["scored"],
            *repair,
            "-o",
            out / "shrunk",
            "--no-speed",
            *rows,
        ],
        ["shrink", model, "--corpus", text["scored"], *unrepaired, "-o", out / "taught", *rows],
        ["run", job_file],
        ["report", "-w", w, "--by", own, "-o", out / "report.html"],
        ["publish", out / "published", "-w", w],
    ]
    out.mkdir()
    with server.asking_for_keys():
        outputs = [succeed(*command).output for command in commands]
    job_file.unlink()
    written = files(tmp_path).values()
    for secret in (server.secret, quote(server.secret, safe=""), server.key):
        assert_nowhere(secret, outputs, written, [w, f"{out}/shrunk-warehouse", f"{out}/taught-warehouse"])
