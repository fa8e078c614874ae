"""Series in job files: revisions that are nearest to points on a log scale, seeds, and names of checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import avss_dist
from avss_dist.core.errors import ConfigError
from avss_dist.core.validation import adapter
from avss_dist.runs import job_file
from avss_dist.runs.job_file import JobFile, read_job
from avss_dist.runs.job_series import (
    NearestRevisions,
    RevisionRange,
    nearest_revisions,
    place_in_training,
    require_range,
)
from avss_dist.warehouse.reader import Warehouse

PYTHIA = ["main", "step0", *(f"step{2**power}" for power in range(10)), *(f"step{1000 * n}" for n in range(1, 144))]


def wanted(**keys: Any) -> RevisionRange:
    return require_range(adapter(RevisionRange).validate_python({"prefix": "step", **keys}))


def nearest(existing: list[str], **keys: Any) -> NearestRevisions:
    return nearest_revisions(wanted(**keys), existing)


def test_each_point_is_the_nearest_revision_that_exists() -> None:
    numbers = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 4000, 8000, 16000, 33000, 66000, 131000]
    assert nearest(PYTHIA, **{"from": 1, "to": 143000, "factor": 2}).names == [f"step{number}" for number in numbers]


def test_the_difference_from_the_wanted_points_is_said() -> None:
    note = nearest(PYTHIA, **{"from": 256, "to": 4096, "factor": 2}).note
    assert note == (
        "5 revisions for 5 points by factor 2; the nearest that exists is 1,000 for 1,024, 2,000 for 2,048, "
        "4,000 for 4,096."
    )


def test_revisions_at_all_points_need_no_note() -> None:
    assert nearest(PYTHIA, **{"from": 1, "to": 512, "factor": 2}).note == ""


def test_points_per_decade_are_rounded() -> None:
    expected = [1, 2, 3, 6, 10, 18, 32, 56, 100, 178, 316, 562, 1000]
    assert wanted(**{"from": 1, "to": 1000, "per_decade": 4}).points() == expected


def test_no_revision_is_taken_twice() -> None:
    chosen = nearest(["step1", "step100"], **{"from": 1, "to": 100, "factor": 3})
    assert chosen.names == ["step1", "step100"]
    assert chosen.note == (
        "2 revisions for 5 points by factor 3; the nearest that exists is 100 for 81; no revision of their own have "
        "3, 9, 27."
    )


def test_near_is_meant_on_a_log_scale() -> None:
    """By its difference, 40 is nearer to 10."""
    assert nearest(["step10", "step100"], **{"from": 10, "to": 100, "factor": 4}).names == ["step10", "step100"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["stage1-step1000-tokens3B", "stage1-step9000-tokens19B", "main"], ["stage1-step1000-tokens3B"]),
        (["stage1-step1k", "stage1-step1000x"], ["stage1-step1k"]),
        (["stage1-step1000-ema", "stage1-step1000"], ["stage1-step1000"]),
    ],
)
def test_text_after_the_number_is_part_of_a_revision(names: list[str], expected: list[str]) -> None:
    assert nearest(names, **{"prefix": "stage1-step", "from": 1000, "to": 2000, "factor": 2}).names == expected


def test_several_revisions_of_a_number_are_refused() -> None:
    with pytest.raises(ConfigError, match="Several revisions have the number 10: step10-a, step10-b"):
        nearest(["step10-a", "step10-b"], **{"from": 10, "to": 20, "factor": 2})


def test_a_prefix_without_revisions_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="No revision is 'ckpt' and a number from 1 to 8") as refused:
        nearest(PYTHIA, **{"prefix": "ckpt", "from": 1, "to": 8, "factor": 2})
    assert str(refused.value.hint).startswith("There are: main, step0, step1")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"from": 0, "to": 8, "factor": 2}, "'from' must be at least 1 with `factor`"),
        ({"from": 9, "to": 8, "per_decade": 2}, "'from' 9 is larger than 'to' 8"),
        ({"from": 9, "to": 8}, "'from' 9 is larger than 'to' 8"),
        ({"from": 1, "to": 8, "factor": 2, "per_decade": 4}, "`factor` and `per_decade` exclude each other"),
        ({"from": 1, "to": 8, "step": 2, "factor": 2}, "`step` and `factor` exclude each other"),
        ({"from": 1, "to": 143000, "factor": 1.00001}, "at most 10,000 steps"),
        ({"from": 1, "to": 143000, "factor": 1 + 2**-52}, "at most 10,000 steps"),
        ({"from": 1, "to": 10, "per_decade": 10**9}, "at most 10,000 steps"),
    ],
)
def test_ranges_without_a_meaning_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wanted(**keys)


def test_a_range_of_one_point() -> None:
    assert nearest(PYTHIA, **{"from": 8, "to": 8, "factor": 2}).names == ["step8"]


# In job files.

GIVEN = "warehouse: w\ncorpora: [builtin:pydoc]\nmodels:\n"


def job_of(folder: Path, models: str, **options: Any) -> JobFile:
    file = folder / "job.yaml"
    file.write_text(GIVEN + models)
    return read_job(file, **options)


def problem_of(folder: Path, models: str) -> str:
    with pytest.raises(ConfigError) as refused:
        job_of(folder, models)
    return refused.value.message


def models_of(job: JobFile) -> list[str]:
    return [spec.model for spec in job.specs]


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    """Folders of three seeds, of which the last lacks a step."""
    for seed, steps in ((1, (100, 200)), (2, (100, 200)), (3, (100,))):
        for step in steps:
            (tmp_path / f"run-v{seed}" / f"checkpoint-{step}").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def pythia(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub on which every model has Pythia's revisions."""
    monkeypatch.setattr(job_file, "list_revisions", lambda model: PYTHIA)


@pytest.mark.usefixtures("pythia")
def test_the_seeds_of_a_group_have_the_same_revisions(tmp_path: Path) -> None:
    models = (
        '- {seeds: {model: "org/m-seed{}", values: 1..2}, revisions: {prefix: step, from: 512, to: 1024, factor: 2}}'
    )
    job = job_of(tmp_path, models)
    assert models_of(job) == [f"org/m-seed{seed}@step{step}" for seed in (1, 2) for step in (512, 1000)]


@pytest.mark.usefixtures("pythia")
def test_a_note_on_several_models_is_made_once(tmp_path: Path) -> None:
    models = (
        '- {seeds: {model: "org/m-seed{}", values: 1..4}, revisions: {prefix: step, from: 512, to: 1024, factor: 2}}'
    )
    (note,) = job_of(tmp_path, models).notes
    assert note.startswith("org/m-seed1, org/m-seed2 and 2 more: 2 revisions for 2 points by factor 2; ")


def test_points_on_a_log_scale_are_as_wanted_where_the_hub_is_not_asked(tmp_path: Path) -> None:
    models = "- {model: org/m, revisions: {prefix: step, from: 512, to: 1024, factor: 2}}"
    assert models_of(job_of(tmp_path, models, expand=False)) == ["org/m@step512", "org/m@step1024"]


def test_revisions_that_are_not_there_are_a_problem_of_their_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_file, "list_revisions", lambda model: ["main"])
    models = "- model: org/m\n  revisions: {prefix: step, from: 512, to: 1024, factor: 2}"
    assert problem_of(tmp_path, models).endswith(
        "job.yaml:5: No revision is 'step' and a number from 512 to 1,024. There are: main."
    )


def test_a_group_of_seeds_is_folders_of_each(seeds: Path) -> None:
    job = job_of(seeds, f'- seeds: {{model: "{seeds}/run-v{{}}/checkpoint-*", values: 1..2}}')
    steps = [(seed, step) for seed in (1, 2) for step in (100, 200)]
    assert models_of(job) == [f"{seeds}/run-v{seed}/checkpoint-{step}" for seed, step in steps]


def test_the_place_of_a_model_follows_from_its_group(seeds: Path) -> None:
    job = job_of(seeds, f'- seeds: {{model: "{seeds}/run-v{{}}/checkpoint-*", values: [2]}}')
    points = [place_in_training(spec.model, spec.names) for spec in job.specs]
    assert {(point.seed, point.seed_group) for point in points} == {(2, f"{seeds}/run-v*/checkpoint-*")}


def test_a_seed_that_lacks_a_step_is_noted(seeds: Path) -> None:
    job = job_of(seeds, f'- seeds: {{model: "{seeds}/run-v{{}}/checkpoint-*", values: 1..3}}')
    assert job.notes == (f"{seeds}/run-v*/checkpoint-*: seed 3 lacks 200, which other seeds have.",)


def test_names_tell_the_seed_of_a_glob(seeds: Path) -> None:
    job = job_of(seeds, f"- model: {seeds}/run-v*/checkpoint-*\n  names: run-v{{seed}}/*")
    assert [place_in_training(spec.model, spec.names).seed for spec in job.specs] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("folders", "models", "message"),
    [
        (
            ["checkpoint-100", "checkpoint-0100"],
            "- checkpoint-*",
            "'checkpoint-0100' and 'checkpoint-100' are at the same point of the training",
        ),
        (["run-seed1/step5", "run-seed01/step5"], "- run-seed*/step*", "are at the same point of the training"),
        (
            ["a/at-5", "b/at-5"],
            "- {model: '*/at-*', names: '*/at-{step}'}",
            "'a/at-5' and 'b/at-5' are at the same point of the training",
        ),
        (["x"], "- {model: x, names: 'at-{step}'}", "no name of this entry has the pattern 'at-{step}'"),
        ([], '- seeds: {model: "run-{}/checkpoint-*", values: [7]}', "no folder matches 'run-7/checkpoint-*'"),
    ],
)
def test_checkpoints_that_are_no_series_are_refused(
    folders: list[str], models: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    assert message in problem_of(tmp_path, models)


def test_a_link_to_the_last_checkpoint_is_no_other_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint-100").mkdir()
    (tmp_path / "latest").symlink_to("checkpoint-100")
    assert models_of(job_of(tmp_path, '- "[cl]*"')) == ["checkpoint-100", "latest"]


def test_an_epoch_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for epoch in (1, 2):
        (tmp_path / f"epoch_{epoch}").mkdir()
    (note,) = job_of(tmp_path, "- epoch_*").notes
    assert note.startswith("epoch_1, epoch_2: this name has an epoch, which is not a step")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("seeds: {model: org/a, values: 1..9}", "'org/a' must have {} in one place"),
        (
            'seeds: {model: "org/a{}", values: 9..1}',
            "the first of the seeds '9..1' is larger than the last. Write 1..9.",
        ),
        ('seeds: {model: "org/a{}", values: [1, 01]}', "the seed 1 is there twice"),
        ('seeds: {model: "org/a{}", values: [x]}', "'x' is not a seed"),
        ('seeds: {model: "org/a{}", values: []}', "expected seeds as a range"),
        ('seeds: {model: "org/a{}", values: 3}', "expected seeds as a range"),
        ('seeds: {model: "org/a{}", values: 1..2000}', "more than 1,000 seeds"),
        ('seeds: {model: "org/a{}"}', "values is missing"),
        ('{model: a, seeds: {model: "org/a{}", values: 1..1}}', "model and seeds exclude each other"),
        ("revisions: [main]", "model or seeds must be given"),
        ("{model: a, names: run}", "has none of {step}"),
        ("{model: a, revisions: {from: 0, to: 5, factor: 2}}", "'from' must be at least 1 with factor"),
        ("{model: a, revisions: {from: 1, to: 5, factor: 1}}", "factor must be greater than 1"),
        ("{model: a, revisions: {from: 1, to: 5, factor: inf}}", "factor must be"),
        ("{model: a, revisions: {from: 1, to: 5, per_decade: 0}}", "per_decade must be at least 1"),
    ],
)
def test_keys_without_a_meaning_are_refused(entry: str, message: str, tmp_path: Path) -> None:
    assert message in problem_of(tmp_path, f"- {entry}")


def test_one_seed_is_a_group(tmp_path: Path) -> None:
    assert models_of(job_of(tmp_path, '- seeds: {model: "org/a{}", values: 1..1}')) == ["org/a1"]


def test_seeds_keep_their_zeros(tmp_path: Path) -> None:
    job = job_of(tmp_path, '- seeds: {model: "org/a{}", values: 08..10}')
    assert models_of(job) == ["org/a08", "org/a09", "org/a10"]


# In the warehouse.


@pytest.fixture(scope="module")
def scored(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse with a checkpoint, and beside it the folder, whose seed and step a job file tells."""
    root = tmp_path_factory.mktemp("scored")
    folder = root / "v3" / "at-100"
    shutil.copytree(tiny_llama, folder)
    job = root / "job.yaml"
    job.write_text(
        f"warehouse: {root}/w\nmodels: [{{model: '{folder}', names: 'v{{seed}}/at-{{step}}'}}]\n"
        "corpora: [builtin:pydoc]\nexecution: {executor: local}\n"
        "settings: {max_sequences: 4, sequence_length: 16, sites: [block]}\n"
    )
    avss_dist.run(job)
    return root


def test_the_seed_is_a_column_of_runs(scored: Path) -> None:
    (row,) = Warehouse(scored / "w").sql("SELECT seed, seed_group, training_step FROM runs").to_pylist()
    assert row == {"seed": 3, "seed_group": f"{scored}/v*/at-*", "training_step": 100}


def test_the_seed_is_listed(scored: Path) -> None:
    assert avss_dist.ls(warehouse=scored / "w").table()["seed"].to_pylist() == [3]


def test_what_a_job_says_of_names_is_in_no_id(scored: Path) -> None:
    run = avss_dist.score(
        scored / "v3" / "at-100",
        corpus="builtin:pydoc",
        warehouse=scored / "w",
        executor="local",
        max_sequences=4,
        sequence_length=16,
        sites=["block"],
    )
    assert run.status == "skipped"


def test_the_models_of_a_job_are_those_of_its_seeds(tmp_path: Path) -> None:
    """They are checked for relative paths before a job is submitted."""
    job = job_of(tmp_path, '- seeds: {model: "run-{}", values: 1..2}', expand=False)
    assert [*job.models] == ["run-1", "run-2"]
