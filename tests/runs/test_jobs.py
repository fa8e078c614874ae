"""Job files: every mistake at once with its line, what they expand to, the plan, one model that fails; no Ray here."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from support import command_line
from support.checkpoints import llama
from support.command_line import in_one_line
from support.json_files import read_json
from support.tables import assert_same_tables

import avss_dist
from avss_dist import estimation
from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import Settings
from avss_dist.estimation import preview_job
from avss_dist.partition.execution import Replicas
from avss_dist.partition.placement import Placement
from avss_dist.runs import planner
from avss_dist.runs.events import LogRuns, RunEnded, RunReading, RunStarted, ShardMeasured
from avss_dist.runs.job_file import JobFile, job_schema, read_job
from avss_dist.runs.local import LocalExecutor
from avss_dist.runs.result import Run
from avss_dist.runs.scoring import run_job
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.store import Store

JOBS = Path(__file__).parents[2] / "jobs"
SHIPPED = sorted(JOBS.glob("*.yaml"))
SETTINGS = "settings: {max_sequences: 12, sequence_length: 32, sequences_per_shard: 4, batch_size: 2}\n"
LOCAL = "execution: {executor: local}\n"


def job_file(folder: Path, text: str) -> Path:
    file = folder / "job.yaml"
    file.write_text(text)
    return file


def read(folder: Path, text: str, **options: Any) -> JobFile:
    return read_job(job_file(folder, text), **options)


def problems(folder: Path, text: str) -> list[str]:
    """Return the problems of a job file, each with its line and without the file's name."""
    with pytest.raises(ConfigError) as caught:
        read(folder, text)
    assert caught.value.exit_code == 2
    lines = caught.value.message.splitlines()
    if len(lines) > 1:
        assert lines.pop(0) == f"{folder}/job.yaml has {len(lines)} problems:"
    return [line.removeprefix(f"{folder}/job.yaml").removeprefix(":") for line in lines]


def avss(*args: object) -> tuple[int, str]:
    result = command_line.avss(*args)
    return result.exit_code, result.output


def test_every_problem_is_reported_at_once_with_its_line(tmp_path: Path) -> None:
    text = """\
warehouse: w
models:
  - model: org/name
    revisions: {prefix: step, from: 10}
    partitions: single
  - /nowhere/checkpoint-*
corpra:
  - builtin:pydoc
settings:
  dtype: bfloat17
  sequence_length: long
execution:
  replicas: 0
  fresh: true
"""
    assert problems(tmp_path, text) == [
        "4: to is missing.",
        "5: Unknown key 'partitions'. Did you mean 'partition'?",
        f"6: no folder matches '/nowhere/checkpoint-*' (relative paths start in {Path.cwd()})",
        "7: Unknown key 'corpra'. Did you mean 'corpora'?",
        "10: Unknown dtype 'bfloat17'. Did you mean 'bfloat16'? Valid: auto, float32, bfloat16, float16.",
        "11: sequence_length must be a whole number, not 'long'.",
        "13: replicas must be at least 1, not 0.",
        "14: Unknown key 'fresh'. Use avss run --fresh.",
    ]


NO_JOB = " is not a job file: expected a mapping with keys."
GIVEN = "warehouse: w\ncorpora: [builtin:pydoc]\n"
RANKS = "ranks applies to fsdp, zero3, tensor_parallel and expert_parallel, not to partition auto. Leave it out."


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", [NO_JOB]),
        ("- a\n", [NO_JOB]),
        ("models: [a]\n", ["1: corpora is missing.", "1: warehouse is missing."]),
        ("warehouse: [w]\nmodels: [a]\ncorpora: [builtin:pydoc]\n", ["1: warehouse must be a text, not ['w']."]),
        (
            "warehouse: w\nmodels: [a]\ncorpora: [builtin:pydoc, builtin:pydoc]\n",
            ["3: 'builtin:pydoc' is named twice"],
        ),
        (GIVEN + "models: []\n", ["3: models must not be empty."]),
        (GIVEN + "models: [a]\nmodels: [b]\n", ["4: the key 'models' is repeated; the first is in line 3"]),
        (
            GIVEN + "models:\n- a\n- b\n- model: a\n",
            ["6: 'a' is named twice with the same settings, first in line 4"],
        ),
        (
            "warehouse: w\nmodels: [a]\ncorpora: [builtin:pydok, absent.txt]\n",
            [
                "3: Unknown builtin corpus 'pydok'. Did you mean 'pydoc'? Valid: pydoc.",
                "3: absent.txt: no such file. Check the name; a relative one starts in the working directory.",
            ],
        ),
        (
            GIVEN + "models:\n- {model: a, max_memory: {cpu: much}, trust_remote_code: 'perhaps'}\n",
            [
                "4: max_memory: 'much' is not a size. Write 200MB (10^6 bytes), or 20GiB (2^30 bytes).",
                "4: trust_remote_code must be true or false, not 'perhaps'.",
            ],
        ),
        (GIVEN + "models: [{model: a, device: cpu}]\n", ["3: Unknown key 'device'. Did"]),
        (
            GIVEN + "models: [{model: /tmp, revisions: [a]}]\n",
            ["3: '/tmp' is a folder or a file; only a hub id has revisions"],
        ),
        (
            GIVEN + "models: [{model: a, revisions: {from: 1, to: 10001}}]\n",
            ["3: revisions: invalid range: expected 'from' up to 'to' in at most 10,000 steps."],
        ),
        (GIVEN + "models:\n- model: a\n  ranks: 2\n", [f"5: {RANKS}"]),
        (GIVEN + "models: [[a], {model: b, ranks: 2}]\n", ["3: models must be a mapping, not ['a'].", f"3: {RANKS}"]),
        (
            "warehouse: w\ncorpora:\n- builtin:pydoc\n- absent.txt\nmodels: [a]\nsettings: {chat_template: true}\n",
            [
                "2: chat_template has no effect: there are no conversations in builtin:pydoc and absent.txt.",
                "4: absent.txt: no such file.",
            ],
        ),
        (
            GIVEN + "models:\n- a\n- {model: b, dtype: float32}\nexecution:\n  max_memory:\n    gpu0: 3GB\n",
            ["8: max_memory"],  # once, though it is that of both runs
        ),
        (GIVEN + "models: [{model: a, dtype: null}]\n", ["3: dtype must be a text, not nothing."]),
        (
            GIVEN + "models: [{model: a, skip_first_tokens: 300}]\nsettings: {sequence_length: 512, dtype: float}\n",
            ["4: Unknown dtype 'float'."],
        ),
        (
            GIVEN + "models: [a]\nsettings:\n  skip_first_tokens: 300\n  sequence_length: 200\n",
            ["5: skip_first_tokens 300 leaves nothing of 200 tokens."],
        ),
        (
            GIVEN
            + "models:\n"
            + "".join(f"- {{model: m{n}, revisions: {{from: 1, to: 30000, step: 3}}}}\n" for n in range(3)),
            ["1: more than 10,000 runs; split them into several jobs"],
        ),
    ],
    ids=lambda value: value.removeprefix(GIVEN).replace("\n", " ")[:40] if isinstance(value, str) else "",
)
def test_mistakes(text: str, says: list[str], tmp_path: Path) -> None:
    told = problems(tmp_path, text)
    assert len(told) == len(says)
    for line, said in zip(told, says, strict=True):
        assert line.startswith(said)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1\n", r"job.yaml:\d"),
        ("a: b: c\n", r"job.yaml:\d"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a: " + "[" * 30 + "]" * 30, r"job.yaml:1: nested too deeply"),
        ("a: &a [*a]\n", r"job.yaml:1: nested too deeply"),
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{n}: &a{n} [" + f"*a{n - 1}, " * 10 + "]\n" for n in range(1, 9)),
            r"job.yaml:\d: more than 100,000 values",
        ),
        (GIVEN + "# " + "x" * 1_000_000, "at most 1,000,000 bytes"),
        ("a: !!python/object/apply:os.getcwd []\n", "the tag !!python/object/apply:os.getcwd is not plain YAML"),
        ("a: &a {b: 1}\nc: {<<: *a}\n", "job.yaml:2: the tag !!merge is not plain YAML"),
        ('a: 1\n"\\ud800": 1\n', "job.yaml:2: a text has half of a surrogate pair"),
    ],
    ids=["open", "two colons", "deep", "nested", "recursive", "aliases", "large", "tag", "merge", "surrogate"],
)
def test_what_is_no_plain_yaml_is_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        read(tmp_path, text)


def test_a_device_without_end_is_no_job_file() -> None:
    with pytest.raises(ConfigError, match="/dev/zero is too large for a job file"):
        read_job("/dev/zero")


def test_aliases_and_texts_stay_what_the_file_says(tmp_path: Path) -> None:
    text = "models: [{model: no, max_memory: &sizes {0: 1kB}}, {model: 1e5, max_memory: *sizes}]\n"
    job = read(tmp_path, "warehouse: 2026-11-25\ncorpora: [builtin:pydoc]\n" + text)
    assert job.warehouse == "2026-11-25"
    assert [*job.models] == ["no", "1e5"]
    assert [spec.execution.max_memory for spec in job.specs] == [{"0": 1000}] * 2
    assert [spec.name for spec in job.specs] == ["no", "1e5"]


def test_settings_of_an_entry_are_checked_with_those_of_the_job(tmp_path: Path) -> None:
    """Each mistake has the line of the value that makes it one, and mistakes of the job are not repeated."""
    text = """\
warehouse: w
corpora: [builtin:pydoc]
execution: {partition: zero3, ranks: 2, hang_seconds: -1}
models:
- a
- model: b
  partition: single
- model: c
  device: cpu
  modle: d
- {modle: e}
- model: f
  dtype: float
  hang_second: 5
experiment:
  tasks: [builtin:pydoc]
  limits: 3
"""
    assert [line.partition(" Valid")[0] for line in problems(tmp_path, text)] == [
        "3: hang_seconds must be greater than 0, not -1.",
        "9: Unknown key 'device'. Did you mean 'dequantize'?",
        "10: Unknown key 'modle'. Did you mean 'model'?",
        "11: Unknown key 'modle'. Did you mean 'model'?",
        "13: Unknown dtype 'float'. Did you mean 'float32'?",
        "14: Unknown key 'hang_second'.",
        "17: Unknown key 'limits'. Did you mean 'limit'?",
    ]
    text = text.replace("hang_seconds: -1", "hang_seconds: 1").replace("  limits: 3\n", "").partition("- model: c")
    experiment = "experiment:\n  tasks: [builtin:pydoc]\n  shares: []\n"
    assert problems(tmp_path, text[0] + experiment) == [
        "7: ranks applies to fsdp, zero3, tensor_parallel and expert_parallel, not to partition single. Leave it out.",
        "10: shares must not be empty.",
    ]


# The schema for editors.


def test_the_shipped_schema_is_that_of_job_files() -> None:
    code, output = avss("run", "--schema")
    schema = read_json(JOBS / "job.schema.json")
    assert code == 0
    assert json.loads(output) == schema == json.loads(json.dumps(job_schema()))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_jobs_are_valid_and_name_the_schema(file: Path) -> None:
    text = file.read_text()
    assert "# yaml-language-server: $schema=job.schema.json\n" in text
    jsonschema.validate(yaml.safe_load(text.replace("1e-5", "0.00001")), job_schema())
    job = read_job(file)
    assert len(job.specs) >= 3
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w-]+)?", spec.model) for spec in job.specs)


@pytest.mark.parametrize(
    "change",
    [
        {"models": []},
        {"settings": {"dtype": "bfloat17"}},
        {"settings": {"sequence_lenght": 3}},
        {"execution": {"replicas": 0}},
        {"models": [{"revisions": ["main"]}]},
        {"experiment": {}},
    ],
    ids=str,
)
def test_the_schema_refuses_what_reading_refuses(change: dict[str, Any], tmp_path: Path) -> None:
    job = {"warehouse": "w", "models": ["a"], "corpora": ["builtin:pydoc"]}
    jsonschema.validate(job, job_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job | change, job_schema())
    with pytest.raises(ConfigError, match=r"job\.yaml"):
        read(tmp_path, json.dumps(job | change))


def test_keys_of_addresses_are_kept_to_open_them_and_shown_nowhere(tmp_path: Path) -> None:
    text = """
        warehouse: "s3://KEY:SECRET@bucket/w"
        models: [org/a]
        corpora: ["s3://KEY:SECRET@bucket/a.txt", builtin:pydoc]
    """
    job = read(tmp_path, text, expand=False)
    assert job.warehouse == "s3://bucket/w"
    assert job.specs[0].corpus == "s3://bucket/a.txt"
    assert job.specs[0].name == "org/a on s3://bucket/a.txt"
    assert "SECRET" not in repr(job)
    assert getattr(job.warehouse, "full", "") == "s3://KEY:SECRET@bucket/w"
    assert getattr(pickle.loads(pickle.dumps(job.specs[0].corpus)), "full", "") == "s3://KEY:SECRET@bucket/a.txt"


def test_models_by_corpora_with_their_own_settings(tmp_path: Path) -> None:
    for name in ("step-2", "step-10", "step-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-notes.txt").write_text("no model")
    (tmp_path / "text.txt").write_text("some text")
    text = f"""\
warehouse: w
models:
  - {tmp_path}/**/step-*
  - model: org/name
    revisions: [main, {{prefix: step, from: 0, to: 7, step: 3}}, {{prefix: end, from: 1, to: 2}}]
    partition: streaming
    max_memory: {{cpu: 2GB}}
    dtype: bfloat16
    thresholds: [1e-3]
corpora:
  - builtin:pydoc
  - {tmp_path}/text.txt
settings:
  dtype: float32
execution:
  replicas: 2..3
"""
    job = read(tmp_path, text)
    specs = job.specs[::2]
    revisions = ["main", "step0", "step3", "step6", "end1", "end2"]
    folders = [f"{tmp_path}/{name}" for name in ("step-1", "step-10", "step-2")]
    assert [spec.model for spec in specs] == [*folders, *(f"org/name@{r}" for r in revisions)]
    assert [spec.corpus for spec in job.specs[:2]] == ["builtin:pydoc", f"{tmp_path}/text.txt"]
    assert job.specs[1].name == f"{tmp_path}/step-1 on {tmp_path}/text.txt"
    first = specs[0]
    last = specs[-1]
    assert first.settings.dtype == "float32"
    assert first.execution.partition == "auto"
    assert first.execution.replicas == Replicas(2, 3)
    assert last.settings.dtype == "bfloat16"
    assert last.settings.thresholds == (1e-5, 1e-3)
    assert last.execution.partition == "streaming"
    assert last.execution.max_memory == {"cpu": 2_000_000_000}
    elsewhere = read(tmp_path, text, expand=False)
    assert elsewhere.specs[0].model == f"{tmp_path}/**/step-*"


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["family_comparison", "training_checkpoints", "dtype_audit"])
def test_shipped_jobs_can_be_run(name: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network: their models are replaced by folders, their rows by fewer and shorter ones."""
    monkeypatch.chdir(tmp_path)
    text = (JOBS / f"{name}.yaml").read_text()
    text = re.sub(r"revisions: .*", "trust_remote_code: false", text)
    ids = dict.fromkeys(re.findall(r"(?:^  - \{?(?:model: )?)([\w.-]+/[\w.-]+)", text, re.MULTILINE))
    for model in ids:
        shutil.copytree(tiny_llama, tmp_path / model)
    text = re.sub(r"  (sequence_length|max_sequences): .*\n", "", text)
    text += "  max_sequences: 8\n  sequence_length: 64\n  sequences_per_shard: 4\n"
    file = job_file(tmp_path, text)
    code, output = avss("run", file, "--executor", "local")
    runs = len(read(tmp_path, text).specs)
    assert code == 0, output
    assert f"{runs} runs: {runs} done." in output, output
    code, output = avss("run", file, "--dry-run")
    assert code == 0, output
    assert f"{runs} done." in output, output


# Running them in this process.


def test_a_job_is_run_once_and_a_model_that_fails_does_not_stop_it(
    tiny_llama: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    text = f"warehouse: {tmp_path}/w\nmodels: [{tiny_llama}, {tmp_path}/absent, {tiny_bert}]\n"
    file = job_file(tmp_path, text + "corpora: [builtin:pydoc]\n" + SETTINGS + LOCAL)
    code, output = avss("run", file)
    assert code == 1
    assert "3 runs: 2 done, 1 failed." in output
    assert "There is no folder" in output
    options: dict[str, Any] = {"max_sequences": 12, "sequence_length": 32, "sequences_per_shard": 4, "batch_size": 2}
    alone = tmp_path / "alone"
    for model in (tiny_llama, tiny_bert):
        avss_dist.score(model, corpus="builtin:pydoc", warehouse=alone, executor="local", **options)
    assert_same_tables(tmp_path / "w", alone)
    code, output = avss("run", file)
    assert code == 1
    assert "3 runs: 2 skipped, 1 failed." in output
    code, output = avss("run", file, "--dry-run")
    assert code == 1
    assert "2 done, 1 refused." in output


@pytest.mark.nightly
def test_runs_that_differ_in_a_setting_have_names_of_their_own(tiny_llama: Path, tmp_path: Path) -> None:
    """As in jobs/dtype_audit.yaml: one model in two dtypes, on two corpora, told apart in the plan and in the log."""
    (tmp_path / "text.txt").write_text("One word after the other, and another one. " * 200)
    models = ", ".join(f"{{model: {tiny_llama}, dtype: {dtype}}}" for dtype in ("float32", "bfloat16"))
    text = f"warehouse: {tmp_path}/w\nmodels: [{models}]\ncorpora: [builtin:pydoc, {tmp_path}/text.txt]\n"
    file = job_file(tmp_path, text + SETTINGS + LOCAL)
    names = {f"{tiny_llama} (dtype {dtype})" for dtype in ("float32", "bfloat16")}
    assert {spec.title for spec in read_job(file).specs} == names
    assert len({spec.name for spec in read_job(file).specs}) == 4
    code, output = avss("run", file)
    assert code == 0
    assert "4 runs: 4 done." in output
    assert all(f"{name} on builtin:pydoc done" in output for name in names)
    assert {preview.model for preview in preview_job(read_job(file))} == names


def test_a_mistake_ends_a_command_with_two(tiny_llama: Path, tmp_path: Path) -> None:
    code, output = avss("run", job_file(tmp_path, "warehouse: w\nmodel: a\n"))
    assert code == 2
    assert "Did you mean 'models'?" in output
    warehouse = tmp_path / "w"
    code, output = avss("score", tiny_llama, tiny_llama, "--corpus", "builtin:pydoc", "-w", warehouse)
    assert code == 2
    assert "is named twice." in output
    assert not warehouse.exists()


def test_the_plan_runs_no_model_and_takes_the_speed_of_a_run_like_it(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without such a run, the time is unknown."""
    text = f"warehouse: {tmp_path}/w\nmodels: [{tiny_llama}]\ncorpora: [builtin:pydoc]\n" + SETTINGS + LOCAL
    longer = text.replace("max_sequences: 12", "max_sequences: 120")
    first = read(tmp_path, text)
    second = read(tmp_path, longer)
    with monkeypatch.context() as patch:
        for module in ("avss_dist.partition.replica", "avss_dist.runs.work"):
            patch.setattr(f"{module}.open_replica", lambda *_, **__: pytest.fail("a model was opened"))
        (preview,) = preview_job(first)
    assert preview.status == "missing"
    assert preview.reference_run == ""
    assert preview.warning == ""
    assert preview.seconds is None
    job_file_path = tmp_path / "job.yaml"
    code, output = avss("run", job_file_path, "--dry-run")
    assert code == 0
    assert "1 run of unknown time: no finished run has the shape of the model" in output
    (run,) = run_job(first)
    (preview,) = preview_job(second)
    warehouse = tmp_path / "w"
    speed = Warehouse(warehouse).runs()["tokens_per_second"][0].as_py()
    assert preview.reference_run == run.run_id
    assert preview.seconds == pytest.approx(preview.num_tokens / speed)
    code, output = avss("run", job_file_path, "--dry-run")
    assert code == 0
    assert "of measuring, at the speed of earlier runs." in output
    (warehouse / "runs" / f"run_id={run.run_id}" / "run.parquet").unlink()
    next((warehouse / "shard_stats").rglob("shard-00001.parquet")).unlink()
    code, output = avss("run", job_file(tmp_path, text), "--dry-run")
    assert code == 0
    assert "partial 2/3" in output
    (run,) = run_job(first)
    assert run.status == "done"
    assert run.resumed_shards == 2


def test_the_plan_warns_of_a_model_that_does_not_fit(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be opened whole, as was asked for."""
    whole = "execution: {executor: local, partition: single}\n"
    job = read(
        tmp_path, f"warehouse: {tmp_path}/w\nmodels: [{tiny_llama}]\ncorpora: [builtin:pydoc]\n" + SETTINGS + whole
    )
    assert not preview_job(job)[0].warning
    monkeypatch.setattr(estimation, "batch_bytes", lambda *_: 1 << 60)
    assert "it may not fit here: " in preview_job(job)[0].warning


def test_one_tokenizer_reads_a_text_once_whatever_their_names(
    tmp_path: Path, save_checkpoint: Callable[[Any, Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same checkpoint or the same text under another name is the same run."""
    sources: list[str] = []
    tokenize = planner.tokenize_corpus

    def spy(source: str, *args: Any) -> Any:
        sources.append(source)
        return tokenize(source, *args)

    monkeypatch.setattr(planner, "tokenize_corpus", spy)
    first = save_checkpoint(llama(1), tmp_path / "seed-1")
    second = save_checkpoint(llama(2), tmp_path / "seed-2")
    other = shutil.copytree(second, tmp_path / "other-tokens")
    (other / "tokenizer_config.json").write_text((other / "tokenizer_config.json").read_text() + " ")
    models = ", ".join(map(str, [first, second, other, shutil.copytree(first, tmp_path / "copy" / first.name)]))
    words = "One word after the other, and another one. " * 200
    texts = {tmp_path / "a.txt": words, tmp_path / "b.txt": words, tmp_path / "c.txt": words[::-1]}
    for file, text in texts.items():
        file.write_text(text)
    corpora = ", ".join(map(str, texts))
    job = read(tmp_path, f"warehouse: w\nmodels: [{models}]\ncorpora: [{corpora}]\n{SETTINGS}")
    planning = planner.Planner(LocalExecutor(Settings()), Store(tmp_path / "w"))
    ids = [planning.prepare(spec).run_id for spec in job.specs]
    assert sources == [str(tmp_path / name) for name in ("a.txt", "c.txt", "a.txt", "c.txt")]
    assert ids[0::3] == ids[1::3]
    assert ids[:3] == ids[9:]
    assert len(set(ids)) == 6


def test_a_repeated_run_is_told_and_measured_once(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("One word after the other, and another one. " * 200)
    corpora = f"corpora: [{tmp_path}/a.txt, {tmp_path}/b.txt]\n"
    file = job_file(tmp_path, f"warehouse: {tmp_path}/w\nmodels: [{tiny_llama}]\n{corpora}{SETTINGS}{LOCAL}")
    first, second = [spec.name for spec in read_job(file).specs]
    code, output = avss("run", file, "--dry-run")
    said = f"{second} is the same model, text and settings as {first}; measured once."
    assert code == 0
    assert said in in_one_line(output)
    assert "1 missing, 1 repeated." in output
    code, output = avss("run", file)
    assert code == 0
    assert f"{second}: the same model, text and settings as {first}; measured once." in output
    assert "2 runs: 1 done, 1 skipped." in output
    assert Warehouse(tmp_path / "w").runs().num_rows == 1


@pytest.mark.parametrize("text", ["models: [a]\nsetings: {}\n", None, b"\xff"])
def test_a_mistake_names_a_page_that_exists(tmp_path: Path, text: str | bytes | None) -> None:
    file = tmp_path / "job.yaml"
    if text is not None:
        file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        read_job(file)
    (page,) = re.findall(r"/.*\.md", str(caught.value.hint))
    assert Path(page).read_text().startswith("# ")


def test_a_log_has_a_line_for_each_run_and_now_and_then_one_between(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    log = LogRuns(lines.append, 2)
    monkeypatch.setattr("avss_dist.runs.events.LOG_SECONDS", 0.0)
    for name in ("one", "two"):
        log(RunReading(name))
        log(RunStarted(name, 1000, 200, Placement()))
    log(ShardMeasured("one", 300))
    log(RunEnded("one", Run(run_id="one-0", model="one", warehouse="w", status="done")))
    log(RunEnded("two", Run(run_id="two-0", model="two", warehouse="w", status="failed", error="no\nmore")))
    assert re.fullmatch(r"one: 50% of 1,000 tokens, [\d,]+ tokens/s, 0.0 s left", lines[0])
    assert lines[1:] == ["1 of 2 runs: one done", "2 of 2 runs: two failed: no"]
    monkeypatch.setattr("avss_dist.runs.events.LOG_SECONDS", 1000.0)
    log = LogRuns(lines.append, 1)
    log(RunStarted("one", 1000, 0, Placement()))
    log(ShardMeasured("one", 300))
    assert len(lines) == 3
