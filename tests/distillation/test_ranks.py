"""Distillation by two ranks: the weights of one process, a part of the memory, and clear ends."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from support.checkpoints import one_thread, weights_in
from support.command_line import as_words
from support.commands import Command
from support.distilling import SMALL
from support.events import events_of
from support.families import lively, tiny_model
from support.processes import ray_processes, wait_until
from support.rank_processes import Gang

import avss_dist
from avss_dist.core.errors import ConfigError, RunFailed
from avss_dist.distillation import trainer
from avss_dist.distillation.curve import CurvePoint, TrainingAdvanced, ignore
from avss_dist.distillation.distill import DistillTask
from avss_dist.distillation.memory import estimate_memory
from avss_dist.distillation.pair import resolve_pair
from avss_dist.distillation.record import DistillRecord, read_record
from avss_dist.distillation.texts import read_texts
from avss_dist.partition.catalog import SHARDINGS
from avss_dist.partition.group import rank_and_size
from avss_dist.plans.plan import Plan
from avss_dist.pruning.checkpoint import prune
from avss_dist.requests import DistillRequest
from avss_dist.studies.distill import teacher_writer

pytestmark = pytest.mark.nightly

PairOf = Callable[[str], dict[str, Any]]
STEPS = 20
OPTIONS = SMALL | {"tokens": STEPS * 4 * 32, "held_out": 5, "learning_rate": 1e-3, "evaluations": 1}


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """One, as the ranks have."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def ranks(warm_server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    gang = Gang(2, tmp_path_factory.mktemp("ranks"))
    yield gang
    gang.stop()


@pytest.fixture(scope="module")
def pair_of(
    tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[[Any, Path], Path], corpus: Path
) -> PairOf:
    """Options for a family: a tiny teacher and the student that lacks its layer 1."""
    parent = tmp_path_factory.mktemp("pairs")

    def pair(family: str) -> dict[str, Any]:
        teacher = parent / f"{family}-teacher"
        student = parent / f"{family}-student"
        if not teacher.exists():
            model = lively(tiny_model("causal", family))
            save_checkpoint(model, teacher)
            plan = Plan(model=str(teacher), num_layers=3, layers="layers", drop=(1,))
            prune(str(teacher), plan, student)
        return {"student": student, "teacher": teacher, "corpora": [corpus], **OPTIONS}

    return pair


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory, pair_of: PairOf) -> Callable[..., tuple[Path, DistillRecord]]:
    """The checkpoint of a family that one process distils."""
    done: dict[tuple[str, str], tuple[Path, DistillRecord]] = {}

    def distilled(family: str, train: str = "all") -> tuple[Path, DistillRecord]:
        if (family, train) not in done:
            output = tmp_path_factory.mktemp("one") / "out"
            result = avss_dist.distill(**pair_of(family), train=train, output=output)
            done[family, train] = output, result.record
        return done[family, train]

    return distilled


class MeasuredTrainer(trainer.DistillationTrainer):
    """Trainer that keeps the bytes of weights and moments that this process holds after the training."""

    held: tuple[int, int] = 0, 0

    def train(self, *args: Any, **options: Any) -> Any:
        result = super().train(*args, **options)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        moments = 0
        for state in optimizer.state.values():
            for name, tensor in state.items():
                if name != "step":
                    moments += bytes_of(tensor)
        weights = 0
        for parameter in self.model.parameters():
            weights += bytes_of(parameter.data)
            weights += bytes_of(getattr(parameter, "ds_tensor", None))
        MeasuredTrainer.held = weights, moments
        return result


def bytes_of(tensor: torch.Tensor | None) -> int:
    """The bytes in float32 of the part of a tensor that this process holds."""
    if tensor is None:
        return 0
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    return 4 * tensor.numel()


def distill_here(options: dict[str, Any]) -> tuple[int, int]:
    """Do this rank's part of a distillation, and return the bytes of weights and moments that it held."""
    trainer.DistillationTrainer = MeasuredTrainer  # type: ignore[misc]
    request = DistillRequest(**options)
    models = resolve_pair(request, "cpu")
    output = Path(options["output"])
    work = output.with_name("out.part")
    work.mkdir(exist_ok=True)
    texts = read_texts(request, models, partial(teacher_writer, request), ignore)
    DistillTask(request, models, texts, work, output).train_and_write(ignore)
    assert rank_and_size()[1] == 2
    return MeasuredTrainer.held


def assert_near(output: Path, expected: Path) -> None:
    """Equal weights within 1e-5."""
    weights = weights_in(output)
    wanted = weights_in(expected)
    assert weights.keys() == wanted.keys()
    for name, tensor in weights.items():
        difference = (tensor - wanted[name]).abs()
        assert float(difference.max()) < 1e-5


def assert_same_curve(record: DistillRecord | None, expected: DistillRecord) -> None:
    """Equal within rounding."""
    assert record is not None
    assert record.steps == expected.steps == STEPS
    for point, other in zip(record.curve, expected.curve, strict=True):
        assert point.loss == pytest.approx(other.loss, rel=1e-4)
        assert (point.train_loss or 0) == pytest.approx(other.train_loss or 0, rel=1e-4)
        assert point.kept == pytest.approx(other.kept, rel=1e-4)


@pytest.mark.parametrize(
    ("family", "sharding", "train"),
    [
        *(("llama", "zero3", "all"), ("llama", "fsdp", "all"), ("gemma3_text", "fsdp", "all")),
        *(("mixtral", "zero3", "all"), ("llama", "zero1", "all"), ("llama", "ddp", "lora")),
    ],
)
def test_two_ranks_give_the_weights_of_one_process(
    ranks: Gang,
    pair_of: PairOf,
    by_one: Callable[..., tuple[Path, DistillRecord]],
    tmp_path: Path,
    family: str,
    sharding: str,
    train: str,
) -> None:
    """Each rank holds the part that the estimate says, and PyTorch or DeepSpeed has really divided it."""
    output = tmp_path / "out"
    options = {**pair_of(family), "output": output, "ranks": 2, "sharding": sharding, "train": train}
    held = ranks.run(distill_here, options)
    expected, record = by_one(family, train)
    assert_near(output, expected)
    assert_same_curve(read_record(output), record)
    checkpoint = tmp_path / "out.part" / "checkpoints" / f"checkpoint-{STEPS}"
    info = SHARDINGS[sharding]
    assert bool(list(checkpoint.rglob("*zero_pp_rank_1*"))) == bool(info.zero_stage)
    assert bool(list(checkpoint.rglob("pytorch_model_fsdp.bin"))) == (sharding == "fsdp")
    request = DistillRequest(**options)
    models = resolve_pair(request, "cpu")
    memory = estimate_memory(
        models.student,
        models.teacher,
        models.settings,
        models.teacher_settings,
        train=train,
        rank=request.lora_rank,
        sharding=sharding,
        ranks=2,
    )
    for weights, moments in held:
        assert moments == pytest.approx(memory.parts["optimizer"], rel=0.03)
        expected_weights = memory.parts["student"]
        if info.zero_stage:
            expected_weights -= 2 * memory.trained
        assert weights == pytest.approx(expected_weights, rel=0.03)


# Through Ray.


@pytest.fixture(scope="module")
def cluster(warm_workers: None) -> Iterator[None]:
    """One private Ray for all tests, so that none waits for another's start."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_a_killed_rank_ends_the_training_which_then_goes_on(pair_of: PairOf, tmp_path: Path) -> None:
    """A rank is killed after the first of eight checkpoints. The driver hears of every step, once."""
    options = {**pair_of("llama"), "evaluations": 8, "tokens": 8 * STEPS * 128}
    avss_dist.distill(**options, output=tmp_path / "one")
    output = tmp_path / "out"
    options |= {"output": output, "ranks": 2, "sharding": "zero2"}
    events: list[Any] = []
    before = ray_processes()

    unfinished = tmp_path / "out.part"

    def kill(event: Any) -> None:
        events.append(event)
        if isinstance(event, CurvePoint) and event.tokens == STEPS * 128:
            wait_until(lambda: trainer.last_checkpoint(unfinished / "checkpoints") is not None)
            started = [process for process in ray_processes() if process not in before]
            newest = max(started, key=lambda process: process.create_time())
            newest.send_signal(signal.SIGKILL)

    with pytest.raises(RunFailed, match=r"Rank [01] (was lost|failed)") as caught:  # on a loaded machine Ray tells late
        avss_dist.distill(**options, on_event=kill)
    assert caught.value.exit_code == 1
    wait_until(lambda: set(ray_processes()) <= set(before))
    with pytest.raises(ConfigError, match="was begun with other values of batch_size, ranks, sharding"):
        avss_dist.distill(**options | {"ranks": 1, "sharding": "ddp"})
    resumed: list[Any] = []
    avss_dist.distill(**options, on_event=resumed.append)
    assert_near(output, tmp_path / "one")
    steps = steps_of(resumed)
    first = 8 * STEPS - len(steps)
    assert first in range(STEPS, 8 * STEPS, STEPS)
    assert steps == list(range(first + 1, 8 * STEPS + 1))
    assert steps_of(events)[:STEPS] == list(range(1, STEPS + 1))
    assert not unfinished.exists()


def steps_of(events: list[Any]) -> list[float]:
    """The steps of a training that events tell of; one has 128 tokens."""
    return [event.tokens / 128 for event in events_of(TrainingAdvanced, events)]


@pytest.mark.usefixtures("warm_workers")
def test_a_signal_ends_all_ranks(pair_of: PairOf, tmp_path: Path) -> None:
    """Ctrl-C, in the middle of the training."""
    options = pair_of("llama")
    student = options.pop("student")
    corpora = options.pop("corpora")
    more = ["--corpora", *corpora, "--ranks", 2, "--tokens", 1e6, "--evaluations", 1000]
    command = Command("distill", student, *as_words(options), *more, "-o", tmp_path / "out")
    running = psutil.Process(command.pid)
    wait_until(lambda: trainer.last_checkpoint(tmp_path / "out.part" / "checkpoints") is not None)
    started = running.children(recursive=True)
    command.send(signal.SIGINT)
    code, _, said = command.wait()
    assert code == 130, said
    for process in started:
        wait_until(lambda process=process: not process.is_running())


@pytest.mark.usefixtures("cluster")
def test_an_error_of_a_rank_is_that_of_the_command(pair_of: PairOf, tmp_path: Path) -> None:
    """Nothing is left running."""
    before = ray_processes()
    with pytest.raises(RunFailed, match=r"the student no better.*Nothing was written"):
        options = pair_of("llama") | {"learning_rate": 1e4, "warmup": 0}
        avss_dist.distill(**options, ranks=2, output=tmp_path / "out")
    wait_until(lambda: set(ray_processes()) <= set(before))
