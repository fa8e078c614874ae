"""Speed of smaller models beside their whole one: order, memory, what cannot be measured, and that nothing is stored.

No test asks how long something takes.
"""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from rich.console import Console
from support.checkpoints import LAYERS, llama
from support.command_line import as_words, files, json_rows, mistake, succeed
from support.families import tiny_model
from transformers import AutoModelForCausalLM

import avss_dist
from avss_dist import evaluate
from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.intervention import Intervention, Sublayer
from avss_dist.core.settings import Settings
from avss_dist.distillation.curve import ignore
from avss_dist.evaluation import speed, timing
from avss_dist.evaluation.placed import PlacedModel
from avss_dist.evaluation.speed import Speed
from avss_dist.evaluation.timing import SpeedSubject, measure_speed, removed_layers
from avss_dist.models.checkpoint.locate import resolve
from avss_dist.partition.placement import SINGLE
from avss_dist.plans.plan import read_plan
from avss_dist.pruning.checkpoint import prune
from avss_dist.reports.terminal.speed import speed_table
from avss_dist.studies import shrink as shrinking

Save = Callable[[Any, Path], Path]
TEXT = "builtin:pydoc"
TASK = f"perplexity:{TEXT}"
READ: dict[str, Any] = {"max_sequences": 4, "sequence_length": 32, "batch_size": 4, "device": "cpu", "dtype": "float32"}
KEY_VALUE_HEADS = 2
HEAD_SIZE = 8
FLOAT32 = 4
LAYER_CACHE = KEY_VALUE_HEADS * HEAD_SIZE * 2 * FLOAT32
"""Bytes of the keys and values of a token in one layer of `llama`."""


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds of a few tokens."""
    for name, number in {"PROMPT_TOKENS": 24, "BATCH_PROMPT_TOKENS": 4, "NEW_TOKENS": 4, "MOST_ROUNDS": 2}.items():
        monkeypatch.setattr(timing, name, number)


def placed(folder: Path, **settings: Any) -> PlacedModel:
    options = {"device": "cpu", "dtype": "float32", **settings}
    return PlacedModel(checkpoint=resolve(str(folder)), settings=Settings(**options), placement=SINGLE)


def measured(whole: Path, *smaller: SpeedSubject) -> list[Speed]:
    return measure_speed(SpeedSubject(label="whole", model=placed(whole)), smaller, ignore)


def without(folder: Path, *layers: int) -> SpeedSubject:
    return SpeedSubject(label="smaller", model=placed(folder), removed=layers)


def by_name(result: Speed) -> dict[str, speed.SpeedMeasure]:
    return {measure.name: measure for measure in result.measures}


def shown(result: Speed) -> str:
    """The table as a wide terminal shows it."""
    terminal = Console(file=StringIO(), width=200)
    terminal.print(speed_table(result))
    return terminal.file.getvalue()


def write_plan(model: Path, file: Path, *drop: int) -> Path:
    plan = {"model": str(model), "layers": "layers", "num_layers": LAYERS, "drop": list(drop)}
    file.write_text(yaml.safe_dump(plan))
    return file


@pytest.fixture
def pruned(tiny_llama: Path, tmp_path: Path) -> Path:
    """A checkpoint without layer 1."""
    plan = read_plan(write_plan(tiny_llama, tmp_path / "plan.yaml", 1))
    return Path(prune(str(tiny_llama), plan, tmp_path / "small er")["folder"])


def test_the_cache_takes_the_bytes_of_its_keys_and_values(tiny_llama: Path) -> None:
    (result,) = measured(tiny_llama, without(tiny_llama, 1))
    assert by_name(result)[speed.CACHE].whole.median == LAYERS * LAYER_CACHE


def test_fewer_layers_have_a_smaller_cache_in_proportion(tiny_llama: Path) -> None:
    (result,) = measured(tiny_llama, without(tiny_llama, 0, 2))
    assert by_name(result)[speed.CACHE].ratio.median == pytest.approx(1 / LAYERS)


@pytest.mark.nightly
def test_a_plan_and_its_checkpoint_take_the_same_memory(tiny_llama: Path, pruned: Path) -> None:
    in_memory, written = measured(
        tiny_llama, without(tiny_llama, 1), SpeedSubject(label="written", model=placed(pruned))
    )
    sizes = [by_name(result)[speed.WEIGHTS].smaller.median for result in (in_memory, written)]
    parameters = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32).parameters()
    assert sizes == [sum(parameter.nbytes for parameter in parameters)] * 2


def test_tied_weights_count_once(save_checkpoint: Save, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    folder = save_checkpoint(model, tmp_path / "tied")
    (result,) = measured(folder, without(folder, 0))
    assert by_name(result)[speed.WEIGHTS].whole.median == FLOAT32 * model.num_parameters()


def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the label of each model that generates in a round."""
    labels = []
    measure = timing._Generator.measure

    def noting(generator: Any) -> Any:
        labels.append(generator._subject.label)
        return measure(generator)

    monkeypatch.setattr(timing._Generator, "measure", noting)
    return labels


def test_models_generate_in_turn(tiny_llama: Path, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = noted(monkeypatch)
    measured(tiny_llama, SpeedSubject(label="smaller", model=placed(pruned)))
    assert labels == ["whole", "smaller"] * 2


@pytest.mark.nightly
def test_models_without_room_for_both_are_opened_one_after_the_other(
    tiny_llama: Path, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = noted(monkeypatch)
    monkeypatch.setattr(timing, "free_memory", lambda device: 1000)
    (result,) = measured(tiny_llama, SpeedSubject(label="smaller", model=placed(pruned)))
    assert labels == ["whole", "whole", "smaller", "smaller"]
    assert result.notes[0] == (
        "The models were measured one after the other, not in turn: they do not fit into memory together."
    )


def test_ratios_are_those_of_each_round() -> None:
    ratio = timing._timed("decoding", speed.TOKENS_PER_SECOND, [20.0, 40.0, 33.0], [10.0, 40.0, 22.0]).ratio
    assert ratio == speed.Spread(median=1.5, low=1.0, high=2.0)


@pytest.mark.parametrize(("ratios", "notes"), [([1.0, 1.9], 0), ([1.0, 2.1], 1)])
def test_people_are_told_of_rounds_that_differ_widely(ratios: list[float], notes: int) -> None:
    measure = timing._timed("decoding", speed.TOKENS_PER_SECOND, ratios, [1.0, 1.0])
    assert len(list(timing._unsteady([measure, measure]))) == notes


def test_less_time_to_the_first_token_is_faster() -> None:
    assert timing._timed("first token", speed.SECONDS, [1.0], [3.0]).ratio.median == 3.0


def test_a_short_context_has_a_shorter_prompt(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PROMPT_TOKENS", 512)
    (result,) = measured(tiny_llama, without(tiny_llama, 1))
    assert result.prompt_tokens == 128 - timing.NEW_TOKENS
    assert result.notes[0] == "The prompt has 124 tokens, as the context has room for no more."


def test_a_context_without_room_for_a_prompt_is_refused(save_checkpoint: Save, tmp_path: Path) -> None:
    folder = save_checkpoint(llama(max_position_embeddings=4), tmp_path / "short")
    with pytest.raises(ConfigError, match="reads at most 4 tokens"):
        measured(folder, without(folder, 1))


def test_each_model_has_its_dtype(tiny_llama: Path) -> None:
    narrow = SpeedSubject(label="narrow", model=placed(tiny_llama, dtype="bfloat16"), removed=(1,))
    whole = SpeedSubject(label="whole", model=placed(tiny_llama))
    (result,) = measure_speed(whole, [narrow], ignore)
    assert by_name(result)[speed.CACHE].ratio.median == pytest.approx((LAYERS - 1) / LAYERS / 2)
    assert "bfloat16, the whole model float32" in shown(result)


@pytest.mark.nightly
def test_states_of_a_recurrence_are_a_cache(save_checkpoint: Save, tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_model("causal", "mamba"), tmp_path / "mamba")
    (result,) = measured(folder, SpeedSubject(label="again", model=placed(folder)))
    config = AutoModelForCausalLM.from_pretrained(folder).config
    states = config.num_hidden_layers * config.intermediate_size * (config.state_size + config.conv_kernel)
    assert by_name(result)[speed.CACHE].whole.median * result.cache_tokens == FLOAT32 * states


def test_counters_and_settings_of_a_cache_take_no_memory() -> None:
    keys = torch.zeros(1, 2, 5, 8)
    assert timing.cache_tensors({"keys": [keys, keys], "length": torch.tensor(5), "name": "cache"}) == [keys]


class Event:
    """An event of a GPU: the place at which it was recorded, a second after the event before."""

    recorded: ClassVar[list[Event]] = []

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.recorded.append(self)

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 1000.0 * (self.recorded.index(end) - self.recorded.index(self))


def test_a_gpu_is_timed_by_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", ignore)
    clock = timing._Clock(torch.device("cuda"))
    for _ in range(4):
        clock.mark()
    assert clock.seconds(1, 3) == 2.0


@pytest.mark.parametrize(
    ("intervention", "layers"),
    [
        (Intervention(removed=(0, 2)), (0, 2)),
        (Intervention(removed=(Sublayer(layer=1, part="mlp"),)), None),
    ],
)
def test_whole_layers_alone_are_left_out(intervention: Intervention, layers: tuple[int, ...] | None) -> None:
    assert removed_layers(intervention) == layers


@pytest.mark.nightly
def test_evaluations_have_the_speed_of_plans_and_checkpoints(tiny_llama: Path, pruned: Path, tmp_path: Path) -> None:
    plan = write_plan(tiny_llama, tmp_path / "two.yaml", 0, 1)
    done = evaluate([str(pruned), str(plan)], tasks=[TASK], warehouse=tmp_path / "w", speed=True, **READ)
    assert [result.smaller for result in done.speed] == [str(pruned), str(plan)]
    assert done.speed[0].table()["measure"].to_pylist() == [
        *("first token", "decoding, batch 1", "decoding, batch 8", "weights", "cache per token")
    ]


def test_speed_changes_no_id_and_is_not_stored(pruned: Path, tmp_path: Path) -> None:
    evaluate([str(pruned)], tasks=[TASK], warehouse=tmp_path / "w", **READ)
    before = files(tmp_path / "w").keys()
    evaluate([str(pruned)], tasks=[TASK], warehouse=tmp_path / "w", speed=True, **READ)
    assert files(tmp_path / "w").keys() == before


@pytest.mark.nightly
def test_streamed_models_are_evaluated_without_their_speed(pruned: Path, tmp_path: Path) -> None:
    done = evaluate([str(pruned)], tasks=[TASK], warehouse=tmp_path / "w", speed=True, partition="streaming", **READ)
    assert done.speed == ()
    assert done.findings[-1].startswith("Speed was not measured. `partition` streaming of ")


def test_sublayers_are_evaluated_without_their_speed(tiny_llama: Path, tmp_path: Path) -> None:
    plan = write_plan(tiny_llama, tmp_path / "plan.yaml")
    plan.write_text(plan.read_text().replace("drop: []", "drop: [attention.1]"))
    done = evaluate([str(plan)], tasks=[TASK], warehouse=tmp_path / "w", speed=True, **READ)
    assert "its speed is not measured" in done.findings[-1]


def test_speed_needs_a_smaller_model(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of these is smaller"):
        evaluate([str(tiny_llama)], tasks=[TASK], warehouse=tmp_path / "w", speed=True, **READ)
    assert not (tmp_path / "w").exists()


def test_an_encoder_is_refused(tiny_bert: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no head that predicts the next token"):
        evaluate([str(tiny_bert)], tasks=[TASK], warehouse=tmp_path, base=str(tiny_llama), speed=True, **READ)


@pytest.mark.nightly
def test_json_has_a_row_for_each_measure(pruned: Path, tmp_path: Path) -> None:
    words = ["evaluate", pruned, "--tasks", TASK, "--speed", "-w", tmp_path / "w", *as_words(READ)]
    rows = json_rows(succeed(*words, "--format", "json").stdout)
    assert [row["measure"] for row in rows if "measure" in row] == [
        *("first token", "decoding, batch 1", "decoding, batch 8", "weights", "cache per token")
    ]


def test_csv_has_no_place_for_speed(pruned: Path, tmp_path: Path) -> None:
    words = ["evaluate", pruned, "--tasks", TASK, "--speed", "-w", tmp_path / "w", *as_words(READ)]
    assert "Set --format to json" in mistake(*words, "--format", "csv")


SHRINK = {**READ, "max_sequences": 16, "repair": "none", "corpus": TEXT}


@pytest.mark.nightly
def test_shrinking_measures_the_model_without_its_layers(tiny_llama: Path, tmp_path: Path) -> None:
    done = avss_dist.shrink(tiny_llama, output=tmp_path / "out", **SHRINK)
    assert done.speed is not None
    assert by_name(done.speed)[speed.CACHE].ratio.median == pytest.approx((LAYERS - 1) / LAYERS)


@pytest.mark.nightly
def test_an_interrupt_of_the_measurement_leaves_no_checkpoint(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shrinking, "measure_speed", interrupted)
        avss_dist.shrink(tiny_llama, output=tmp_path / "out", **SHRINK)
    before = files(tmp_path / "out-warehouse")
    assert not (tmp_path / "out").exists()
    avss_dist.shrink(tiny_llama, output=tmp_path / "out", speed=False, **SHRINK)
    assert files(tmp_path / "out-warehouse").keys() == before.keys()


@pytest.mark.nightly
def test_a_model_that_does_not_generate_is_written_all_the_same(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ModelError("It does not generate.")

    monkeypatch.setattr(shrinking, "measure_speed", broken)
    done = avss_dist.shrink(tiny_llama, output=tmp_path / "out", **SHRINK)
    assert done.notes[-1] == "Speed was not measured. It does not generate."
