"""Trackers of experiments are told of runs, and change none of them."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import avss_dist as avss
from avss_dist.core.errors import ConfigError, RunFailed
from avss_dist.core.settings import TRACKERS

SMALL: dict[str, Any] = {
    "corpus": "builtin:pydoc",
    "max_sequences": 8,
    "sequence_length": 16,
    "batch_size": 4,
    "sequences_per_shard": 4,
    "sites": ("block",),
    "executor": "local",
}


class Recorded:
    """In the place of the module ``wandb``: it opens runs, which are itself, and keeps what they are told.

    Attributes:
        heard: by run.
        broken: it cannot log.
    """

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self.broken = False

    def init(self, **options: Any) -> Any:
        heard: dict[str, Any] = {"options": options, "logged": [], "ended": None}
        self.heard.append(heard)

        def log(values: dict[str, Any]) -> None:
            if self.broken:
                raise OSError("no network")
            heard["logged"].append(values)

        def finish(exit_code: int) -> None:
            heard["ended"] = exit_code

        return SimpleNamespace(log=log, finish=finish, define_metric=lambda *_, **__: None)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    library = Recorded()
    monkeypatch.setitem(sys.modules, "wandb", library)
    return library


def test_a_tracker_hears_settings_progress_and_scores(recorded: Recorded, tiny_llama: Path, tmp_path: Path) -> None:
    run = avss.score(tiny_llama, warehouse=tmp_path, tracker="wandb:pruning", **SMALL)
    (heard,) = recorded.heard
    options, config = heard["options"], heard["options"]["config"]
    assert (options["project"], options["id"], options["name"]) == ("pruning", run.run_id, run.run_id)
    assert (config["model"], config["max_sequences"], config["dtype"]) == (str(tiny_llama), 8, "float32")
    assert heard["ended"] == 0 and json.loads(json.dumps(config)) == {**config, "sites": ["block"]} | {
        "thresholds": list(config["thresholds"])
    }
    last, *layers = [values for values in heard["logged"] if values.get("progress/done", 1) == 1]
    assert last["tokens"] == run.num_tokens
    assert [values["layer"] for values in layers] == [0, 1, 2]
    assert [values["layers/avss_smoothed"] for values in layers] == run.table()["avss_smoothed"].to_pylist()
    assert avss.score(tiny_llama, warehouse=tmp_path, tracker="wandb", **SMALL).status == "skipped"
    assert len(recorded.heard) == 1, "what is done is not told again"


def test_a_tracker_that_fails_ends_no_run(
    recorded: Recorded, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded.broken = True
    assert avss.score(tiny_llama, warehouse=tmp_path, tracker="wandb", **SMALL).status == "done"
    assert capsys.readouterr().err.count("no further reports of this run to wandb: no network") == 1


def test_a_run_that_fails_is_ended_as_such(
    recorded: Recorded, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("unplugged")

    monkeypatch.setattr("avss_dist.warehouse.store.Store.write_shard", fail)
    with pytest.raises(RunFailed):
        avss.score(tiny_llama, warehouse=tmp_path, tracker="wandb", **SMALL)
    assert [heard["ended"] for heard in recorded.heard] == [1]


def test_a_tracker_that_cannot_be_told_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"(?s)`tracker` mlflow.*pip install mlflow"):
        avss.score("m", warehouse=tmp_path / "w", tracker="mlflow", **SMALL)
    assert not (tmp_path / "w").exists()
    with pytest.raises(ConfigError, match=r"(?s)'wanbd'.*Did you mean 'wandb'"):
        avss.score("m", warehouse=tmp_path / "w", tracker="wanbd", **SMALL)
    with pytest.raises(ConfigError, match="names no project"):
        avss.score("m", warehouse=tmp_path / "w", tracker="wandb:", **SMALL)
    with pytest.raises(ConfigError, match="`tracker` has no effect"):
        avss.ablate("m", corpus="builtin:pydoc", tracker="wandb")


@pytest.mark.nightly
@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_real_tracker_is_told(
    tracker: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not importlib.util.find_spec(tracker):
        pytest.skip(f"{tracker} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run = avss.score(tiny_llama, warehouse="w", tracker=f"{tracker}:layers", **SMALL)
    assert run.status == "done" and "no further reports" not in capsys.readouterr().err
    if tracker == "trackio":
        (file,) = (tmp_path / "kept").glob("*.db")
        kept = sqlite3.connect(file).execute("SELECT metrics FROM metrics").fetchall()
        layers = [values for (text,) in kept if "layer" in (values := json.loads(text))]
        assert [values["layers/rank"] for values in layers] == run.table()["rank"].to_pylist()
    elif tracker == "wandb":
        assert list(tmp_path.glob(f"wandb/offline-run-*-{run.run_id}"))
    else:
        where = "SELECT value FROM metrics WHERE key = 'layers/rank' ORDER BY step"
        kept = sqlite3.connect(tmp_path / "mlflow.db").execute(where).fetchall()
        assert [rank for (rank,) in kept] == run.table()["rank"].to_pylist()
