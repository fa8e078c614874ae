"""Step, tokens and seed of a checkpoint, from its name."""

from __future__ import annotations

import pytest

from avss_dist.core.errors import ConfigError
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.training import TrainingPoint, compile_names, explain_no_step, training_point


def on_hub(name: str) -> Checkpoint:
    model, _, revision = name.partition("@")
    return Checkpoint(name=model, source="hub", path="/x", revision="f00", revision_name=revision)


def folder(path: str) -> Checkpoint:
    return Checkpoint(name=path, source="folder", path=path, revision="")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("step3000", ("org/a@step*", 3000, None)),
        ("step-240000", ("org/a@step-*", 240_000, None)),
        ("stage1-step140000-tokens294B", ("org/a@stage1-step*-tokens*", 140_000, 294 * 10**9)),
        ("stage2-ingredient1-step5-tokens1B", ("org/a@stage2-ingredient1-step*-tokens*", 5, 10**9)),
        ("global_step20k", ("org/a@global_step*", 20_000, None)),
        ("ckpt_358", ("org/a@ckpt_*", 358, None)),
        ("iter_0001000", ("org/a@iter_*", 1000, None)),
        ("checkpoint_500", ("org/a@checkpoint_*", 500, None)),
        ("step_500", ("org/a@step_*", 500, None)),
        ("ep0-ba1000", ("org/a@ep*-ba*", 1000, None)),
        ("epoch=2-step=700", ("org/a@epoch=*-step=*", 700, None)),
        ("tokens-1.5T", ("org/a@tokens-*", None, 1_500_000_000_000)),
        ("12B-tokens", ("org/a@*-tokens", None, 12 * 10**9)),
        ("epoch_3", ("org/a", None, None)),
        ("main", ("org/a", None, None)),
        ("v2", ("org/a", None, None)),
        ("", ("org/a", None, None)),
        ("footstep3", ("org/a", None, None)),
        ("step99999999999999999999", ("org/a", None, None)),
    ],
)
def test_a_revision_tells_when_it_was_saved(name: str, expected: tuple[str, int | None, int | None]) -> None:
    assert training_point(on_hub(f"org/a@{name}")) == TrainingPoint(*expected)


def test_folders_beside_each_other_are_a_series() -> None:
    saved = [training_point(folder(f"/data/run7/checkpoint-{number}")) for number in (500, 1000)]
    assert saved == [TrainingPoint("/data/run7/checkpoint-*", step) for step in (500, 1000)]


def test_a_folder_without_a_step_is_a_series_of_its_own() -> None:
    checkpoint = Checkpoint(name="models/llama", source="folder", path="/data/models/llama", revision="")
    assert training_point(checkpoint) == TrainingPoint("models/llama")


def test_converted_weights_have_the_place_of_their_folder() -> None:
    """Their path is one in the cache."""
    origin = "/data/run7/checkpoint-500"
    checkpoint = Checkpoint(name=origin, source="folder", path="/cache/f00", revision="", origin=origin)
    assert training_point(checkpoint) == TrainingPoint("/data/run7/checkpoint-*", 500)


@pytest.mark.parametrize(
    ("name", "seed", "group"),
    [
        ("org/pythia-70m-seed3@step1000", 3, "org/pythia-70m-seed*@step*"),
        ("org/pythia-70m-seed3", 3, "org/pythia-70m-seed*"),
        ("org/a@seed_12-step5", 12, "org/a@seed_*-step*"),
        ("ByteDance-Seed/Seed-7B@step5", None, None),
        ("org/Seed-1.6@step5", None, None),
        ("org/data-seed1-init-seed2@step5", None, None),
        ("org/reseed3@step5", None, None),
    ],
)
def test_the_seed_is_in_the_name_of_a_model(name: str, seed: int | None, group: str | None) -> None:
    point = training_point(on_hub(name))
    assert (point.seed, point.seed_group) == (seed, group)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            "/data/run-seed3/checkpoint-500",
            TrainingPoint("/data/run-seed3/checkpoint-*", 500, None, 3, "/data/run-seed*/checkpoint-*"),
        ),
        ("/data/seed3-step20", TrainingPoint("/data/seed3-step*", 20, None, 3, "/data/seed*-step*")),
        ("/data/seed3/a run/checkpoint-500", TrainingPoint("/data/seed3/a run/checkpoint-*", 500)),
        ("/data/run seed 3/checkpoint-500", TrainingPoint("/data/run seed 3/checkpoint-*", 500)),
    ],
)
def test_the_seed_is_in_the_last_two_parts_of_a_path(path: str, expected: TrainingPoint) -> None:
    assert training_point(folder(path)) == expected


@pytest.mark.parametrize(
    ("checkpoint", "pattern", "expected"),
    [
        (folder("/d/m/at 100 of 900"), "at {step} of *", TrainingPoint("/d/m/at * of *", 100)),
        (folder("/d/v3/it-100"), "v{seed}/it-{step}", TrainingPoint("/d/v3/it-*", 100, None, 3, "/d/v*/it-*")),
        (folder("/d/v3/x/step5"), "v{seed}/**", TrainingPoint("/d/v3/x/step*", 5, None, 3, "/d/v*/x/step*")),
        (on_hub("org/m-v3@step5"), "m-v{seed}", TrainingPoint("org/m-v3@step*", 5, None, 3, "org/m-v*@step*")),
        (on_hub("org/m@t1.5B"), "t{tokens}", TrainingPoint("org/m@t*", None, 1_500_000_000)),
        (on_hub("org/bert-seed_3-step_20k"), "*-step_{step}", TrainingPoint("org/*-step_*", 20_000)),
        (on_hub("org/m@checkpoint-3-of-step7"), "*step{step}", TrainingPoint("org/m@*step*", 7)),
        (on_hub("org/m@main"), "at-{step}", TrainingPoint("org/m")),
    ],
)
def test_a_pattern_tells_what_a_name_does_not(checkpoint: Checkpoint, pattern: str, expected: TrainingPoint) -> None:
    assert training_point(checkpoint, [pattern]) == expected


def test_a_pattern_is_looked_for_in_the_path_as_it_was_named() -> None:
    """A link to a folder of another name."""
    link = Checkpoint(name="/runs/v3/step5", source="folder", path="/disk/0815/step5", revision="")
    assert training_point(link, ["v{seed}/*"]).seed == 3


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("run-*", "none of {step}, {tokens} and {seed}"),
        ("{steps}", "unknown field {steps}"),
        ("{step}-{step}", "has {step} twice"),
        ("{}", "unknown field {}"),
    ],
)
def test_patterns_without_a_meaning_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compile_names(pattern)
    assert message in refused.value.message


@pytest.mark.parametrize(("name", "says"), [("epoch_3", True), ("epoch_3_step_4", False), ("main", False)])
def test_an_epoch_is_not_a_step(name: str, says: bool) -> None:
    assert bool(explain_no_step(name)) == says
