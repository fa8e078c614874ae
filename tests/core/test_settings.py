"""Settings and the classes that check their values: every problem at once, fields named."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Annotated, Any

import pytest
from pydantic import Field

from avss_dist.core.errors import ConfigError, nearest, spell_fields
from avss_dist.core.fingerprint import fingerprint
from avss_dist.core.settings import Settings
from avss_dist.core.text import parse_bytes
from avss_dist.core.validation import OneOf, check, checked, descriptions, from_texts
from avss_dist.partition.execution import Execution, Replicas
from avss_dist.requests import ScoreRequest

FIRST_FIELDS = (
    "max_sequences",
    "sequence_length",
    "batch_size",
    "sequences_per_shard",
    "layout",
    "skip_first_tokens",
    "dtype",
    "sites",
    "thresholds",
    "layers",
    "attention",
    "device",
    "trust_remote_code",
)


@checked
class Example:
    count: Annotated[int, Field(ge=1)] = 3
    shares: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False, min_length=1)] = (0.25,)
    name: Annotated[str, OneOf(("block", "mlp"))] = "block"
    size: Annotated[int, check(lambda text: parse_bytes(text) if isinstance(text, str) else text, before=True)] = 0

    def __post_init__(self) -> None:
        if self.count == 7:
            raise ConfigError("`count` 7 is for nobody.", "Use 8.")


def problems(**values: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Example(**values)
    return [str(problem).replace("\n", " ") for problem in caught.value.problems]


def test_a_checked_class_is_a_dataclass() -> None:
    example = Example(shares=[0.5], size="2kB")
    assert example.shares == (0.5,)
    assert example.size == 2000
    assert example == Example(shares=(0.5,), size=2000)
    assert replace(example, count=4).count == 4
    assert asdict(example)["count"] == 3
    assert list(asdict(example)) == ["count", "shares", "name", "size"]
    with pytest.raises(ConfigError):
        replace(example, count=0)


def test_every_problem_is_reported_at_once_and_names_its_field() -> None:
    assert problems(count=True, shares=(0.5, 2), name="blok", size="big", nam="x") == [
        "`count` must be a whole number, not True.",
        "`shares` must be less than 1, not 2.",
        "Unknown `name` 'blok'. Did you mean 'block'? Valid: block, mlp.",
        "`size`: 'big' is not a size. Write 200MB (10^6 bytes), or 20GiB (2^30 bytes).",
        "Unknown option 'nam'. Did you mean 'name'? Valid: count, name, shares, size.",
    ]
    assert problems(shares=()) == ["`shares` must not be empty."]
    assert problems(count=7) == ["`count` 7 is for nobody. Use 8."]


def test_one_problem_is_itself_and_several_are_lines() -> None:
    with pytest.raises(ConfigError) as single:
        Example(name="blok")
    assert single.value.message == "Unknown `name` 'blok'."
    assert single.value.hint == "Did you mean 'block'? Valid: block, mlp."
    with pytest.raises(ConfigError) as two:
        Example(name="blok", count=0)
    assert two.value.message.splitlines()[:2] == ["2 problems:", "`count` must be at least 1, not 0."]


def test_nothing_is_suggested_where_there_is_no_valid_name() -> None:
    assert nearest("block", []) == ""


def test_front_ends_spell_fields() -> None:
    text = "`ranks` is for zero3, not for `partition` single. Run `avss doctor`."
    assert spell_fields(text, {"ranks": "--ranks"}) == (
        "--ranks is for zero3, not for `partition` single. Run `avss doctor`."
    )


def test_every_problem_of_the_settings_is_reported_at_once() -> None:
    values: dict[str, Any] = {
        "sites": ["blok"],
        "batch_size": 0,
        "replicas": 0,
        "max_memory": {"cpu": "big"},
        "rank": 2,
    }
    with pytest.raises(ConfigError) as caught:
        ScoreRequest("model", corpus="text.txt", **values)
    assert [str(problem).partition(".")[0] for problem in caught.value.problems] == [
        "`replicas` must be at least 1, not 0",
        "`max_memory`: 'big' is not a size",
        "`batch_size` must be at least 1, not 0",
        "Unknown `sites` 'blok'",
        "Unknown option 'rank'",
    ]
    with pytest.raises(ConfigError) as caught:
        Execution(executor="local", partition="zero3", address="auto")
    assert len(caught.value.problems) == 2
    assert "--" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_sequences": 0}, "`max_sequences` must be at least 1, not 0."),
        ({"sequence_length": 0}, "`sequence_length` must be at least 1, not 0."),
        ({"skip_first_tokens": -1}, "`skip_first_tokens` must be at least 0, not -1."),
        ({"skip_first_tokens": 32, "sequence_length": 32}, "`skip_first_tokens` 32 leaves nothing of 32 tokens."),
        ({"dtype": "bfloat"}, "Unknown `dtype` 'bfloat'. Did you mean 'bfloat16'?"),
        ({"layout": "pack"}, "Unknown `layout` 'pack'. Did you mean 'packed'?"),
        ({"attention": "eagr"}, "Unknown `attention` 'eagr'. Did you mean 'eager'?"),
        ({"device": "cuda:0"}, "Unknown `device` 'cuda:0'. Did you mean 'cuda'?"),
        ({"executor": "rey"}, "Unknown `executor` 'rey'. Did you mean 'ray'?"),
        ({"executor": "local", "replicas": 2}, "`executor` local is one replica"),
        ({"executor": "local", "address": "auto"}, "`executor` local is one replica"),
    ],
)
def test_a_wrong_value_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ScoreRequest("model", corpus="text.txt", **values)
    assert str(caught.value).replace("\n", " ").startswith(message)


def test_lists_and_sizes_in_words_make_the_same_settings() -> None:
    of_lists = Settings(sites=["mlp", "block"], thresholds=[1e-3, 1])
    assert of_lists == Settings(sites=("block", "mlp"), thresholds=(1e-3, 1.0))
    execution = Execution(max_memory={"cpu": "20GB", "0": 3})
    assert execution.max_memory == {"cpu": 20_000_000_000, "0": 3}


@pytest.mark.parametrize(
    ("written", "replicas", "text"),
    [
        (8, Replicas(1, 8), "8"),
        ("8", Replicas(1, 8), "8"),
        ("1..8", Replicas(1, 8), "8"),
        ("4..64", Replicas(4, 64), "4..64"),
        (Replicas(4, 4), Replicas(4, 4), "4..4"),
    ],
)
def test_replicas_are_a_number_or_a_range(written: Any, replicas: Replicas, text: str) -> None:
    execution = Execution(replicas=written)
    assert execution.replicas == replicas
    assert str(execution.replicas) == text
    assert Execution(replicas=text) == execution


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("64..4", "`replicas`: the minimum of '64..4' is larger than its maximum. Write 4..64."),
        (Replicas(2, 1), "`replicas`: the minimum of '2..1' is larger than its maximum. Write 1..2."),
        ("0..3", "`replicas` must be at least 1, not 0..3."),
        ("3..0", "`replicas` must be at least 1, not 3..0."),
        *[
            (text, f"`replicas`: invalid replica count '{text}': expected an integer (8) or a range (4..64).")
            for text in ("a..b", "3..", "-1", "", "1e3", "2...3")
        ],
        *[
            (value, f"`replicas`: invalid replica count '{value}': expected an integer (8) or a range (4..64).")
            for value in (True, 2.0, [2, 3])
        ],
    ],
)
def test_replicas_that_nobody_can_mean_are_refused(written: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Execution(replicas=written)
    assert str(caught.value).replace("\n", " ").startswith(message)


def test_a_fingerprint_of_settings_is_what_it_was() -> None:
    """Checked classes came after runs were stored under these fingerprints."""
    first = Settings(sequences_per_shard=32).as_dict()
    values = {name: value for name, value in first.items() if name in FIRST_FIELDS}
    assert fingerprint(**values) == "9d35f22952a8849c888b46d998dc90d05ae220f19a19ccd0cd3270d99d136498"


def test_every_field_is_described() -> None:
    for cls in (Settings, Execution):
        assert {*descriptions(cls)} == {f.name for f in fields(cls)}


def test_the_checks_of_every_base_run_and_texts_are_converted() -> None:
    @checked
    class Both(Example, Execution):
        pass

    with pytest.raises(ConfigError) as caught:
        Both(count=7, executor="local", address="auto")
    assert [problem.message.partition(";")[0] for problem in caught.value.problems] == [
        "`executor` local is one replica in this process",
        "`count` 7 is for nobody.",
    ]
    texts = {"count": "4", "shares": ["0.5"], "size": "2kB", "max_memory": ["cpu=20GB", "0=3"], "replicas": "4..8"}
    both = from_texts(Both, texts)
    assert both.count == 4
    assert both.shares == (0.5,)
    assert both.size == 2000
    assert both.max_memory == {"cpu": 20_000_000_000, "0": 3}
    assert str(both.replicas) == "4..8"
    with pytest.raises(ConfigError, match="20GB names no device"):
        from_texts(Both, {"max_memory": ["20GB"]})
