"""Every script of benchmarks and for GPUs runs, at its smallest size; here, or where its numbers are checked too."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import llama, one_thread
from support.commands import Command
from support.warm_workers import ray_start_environment

import avss_dist

TESTS = Path(__file__).parent
SCRIPTS = sorted(path for folder in ("benchmarks", "gpu") for path in (TESTS / folder).glob("*.py"))
Run = Callable[..., str]

DRIVER = "--workers 1 --units 16 --layers 2 --shards 8 --seconds 0.2"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], warm_workers: None) -> Run:
    """Run a script in this process with one thread, and return its output; processes that it starts are forked."""
    for name, value in ray_start_environment().items():
        monkeypatch.setenv(name, value)

    def run(script: str, *options: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
        monkeypatch.setattr(sys, "path", [*sys.path])
        with one_thread():
            try:
                runpy.run_path(str(TESTS / script), run_name="__main__")
            except SystemExit as ended:
                assert not ended.code
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[..., Path]) -> Path:
    """A Llama of rows of 256 tokens, which the scripts read by default."""
    return save_checkpoint(llama(max_position_embeddings=256), tmp_path_factory.mktemp("models") / "wide")


def test_every_script_is_run_by_a_test() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    others = [path for path in SCRIPTS if not path.name.startswith("test_")]
    assert len(others) > 5
    named = r'benchmarks\.{0}\b|(benchmarks|gpu)/{0}\.py|"benchmarks" / "{0}\.py"'
    missing = [path.name for path in others if not re.search(named.format(path.stem), tests)]
    assert not missing


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("script", "options", "printed"),
    [
        ("benchmarks/changes.py", "--series 4 --units 8 16", r"neighbours alike +16 units .*refused"),
        (
            "benchmarks/many_checkpoints.py",
            "--checkpoints 2 --rows 2 --tokens 32 --sequences-per-shard 1 2",
            r"(?s)ratio to bare.*shards: 2 +\d.*shards: 1 +\d",
        ),
        ("benchmarks/damage.py", "WIDE builtin:pydoc --sequences 2 --draws 1", "damage"),
        ("benchmarks/repair.py", "WIDE builtin:pydoc --drop 1 --rows 40 --sequence-length 32", "linear_patch"),
        (
            "benchmarks/smaller.py",
            "WIDE FOLDER --drop 1 --fit builtin:pydoc --text help=builtin:pydoc --repairs refit --rows 8 --fit-rows 12 "
            "--distill-tokens 512",
            r"\| refit-own-distilled \| [0-9.]+ \([+-]",
        ),
        ("benchmarks/throughput.py", "WIDE --rounds 1 --sequences 4", r"(?s)AVSS authors' recipe.*peak memory beyond"),
        ("gpu/first.py", "kernels --dry", r"(?s)\A(?!.*FAILED)."),
        ("gpu/first.py", "models --dry", r"(?s)\A(?!.*FAILED)."),
    ],
)
def test_a_script_prints_what_it_compares(
    script: str, options: str, printed: str, run: Run, wide: Path, tmp_path: Path
) -> None:
    folders = {"WIDE": wide, "FOLDER": tmp_path}
    assert re.search(printed, run(script, *(folders.get(word, word) for word in options.split())))


@pytest.mark.nightly
def test_a_family_is_tried_without_a_change_of_the_table(run: Run) -> None:
    table = (TESTS / "support/families.csv").read_bytes()
    assert run("benchmarks/families.py", "causal", "llama").startswith("causal     llama ")
    assert (TESTS / "support/families.csv").read_bytes() == table


@pytest.mark.nightly
@pytest.mark.usefixtures("warm_workers")
def test_the_script_with_ray_runs_in_a_process_of_its_own() -> None:
    script = Command(TESTS / "benchmarks/driver.py", *DRIVER.split(), program="python", OMP_NUM_THREADS="1")
    code, printed, errors = script.wait()
    assert code == 0, errors[-2000:]
    assert re.search(r"\d", printed)


@pytest.mark.nightly
@pytest.mark.usefixtures("warm_workers")
def test_the_same_numbers_are_made_twice_and_a_changed_one_is_found(tmp_path: Path) -> None:
    """Everything but SmolLM2 and Ray. The second run differs from the first in the line that was changed alone."""

    def made(*options: object) -> tuple[int, list[str]]:
        script = Command(TESTS / "benchmarks/same_numbers.py", "--quick", *options, program="python")
        code, printed, errors = script.wait()
        assert printed, errors[-2000:]
        return code, printed.splitlines()

    code, lines = made()
    assert code == 0 and lines == sorted(lines) and not any(line.startswith("#") for line in lines)
    assert {line.partition(".")[0] for line in lines} >= {"local", "streaming", "contrast", "ablation", "repair"}
    name, number, _ = lines[7].split()
    changed = [*lines[:7], f"{name} {number} 0123456789abcdef", *lines[8:]]
    (tmp_path / "before.txt").write_text("\n".join(changed))
    code, again = made("--compare", tmp_path / "before.txt")
    assert code == 1 and again[:-1] == lines
    assert again[-1].startswith(f"# differs: {name}: {number} 0123456789abcdef before, {number} ")


@pytest.mark.nightly
@pytest.mark.parametrize("experts", [0, 4])
def test_trainings_of_several_seeds_are_saved_at_powers_of_two(run: Run, tmp_path: Path, experts: int) -> None:
    sizes = f"--seeds 1 2 --steps 9 --layers 4 --width 32 --vocabulary 300 --rows 2 --length 32 --experts {experts}"
    run("benchmarks/training.py", tmp_path, *sizes.split())
    saved = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.glob("*/*/model.safetensors"))
    assert saved == [f"run-seed{seed}/checkpoint-{step}" for seed in (1, 2) for step in (1, 2, 4, 8)]


@pytest.mark.nightly
def test_when_rankings_settle_is_told_of_trainings_with_the_loss_without_each_layer(run: Run, tmp_path: Path) -> None:
    sizes = "--seeds 1 2 --steps 4 --layers 4 --width 32 --vocabulary 300 --rows 2 --length 32"
    run("benchmarks/training.py", tmp_path, *sizes.split())
    job = {
        "warehouse": str(tmp_path / "w"),
        "models": [f"{tmp_path}/run-seed*/checkpoint-*"],
        "corpora": [f"{tmp_path}/heldout.txt"],
        "settings": {"dtype": "float32", "sequence_length": 32, "max_sequences": 4, "sites": ["block", "update"]},
        "experiment": {
            "tasks": [f"perplexity:{tmp_path}/test.txt"],
            "max_sequences": 4,
            "random": 0,
            "reversed": False,
            "keep_ends": 0,
            "last": False,
        },
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    avss_dist.run(tmp_path / "job.yaml", executor="local")
    printed = run("benchmarks/settling.py", tmp_path / "w")
    settled, agreement, with_loss = printed.strip().split("\n\n")
    assert settled.count("loss without the layer") == agreement.count("loss without the layer") == 1
    assert "| score | seeds: step 1 | 2 | 4 |" in agreement
    assert len(with_loss.splitlines()) == 2 + 6
