"""Rankings compared: correlations, the lowest sets, depths, what is not comparable; and the command."""

from __future__ import annotations

import io
import math
import shutil
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from scipy import stats
from support.command_line import avss, succeed
from support.rows import column, mapping
from support.tiers import nightly
from support.warehouses import (
    PUBLISHED,
    Terminal,
    activations,
    rewrite_file,
    run_row,
    stats_of,
    write_measured,
    write_profiles,
    write_scores,
)

from avss_dist.analysis.agreement import CorrelationSummary, Scores, correlate_pairs, summarize
from avss_dist.analysis.comparison import SCHEMA, RankingComparison, compare
from avss_dist.analysis.findings import OF_RANKINGS, findings, of_rankings
from avss_dist.core.errors import QueryError
from avss_dist.core.thresholds import PUBLISHED_THRESHOLD
from avss_dist.reports.terminal.scores import comparison_tables, summary
from avss_dist.stats.rankings import align, count_lowest, spearman
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.store import Store

UP = [float(i) for i in range(1, 9)]
DOWN = [float(9 - i) for i in range(1, 9)]
MIXED = [3.0, 1.0, 2.0, 4.0, 8.0, 5.0, 7.0, 6.0]


def pairs(root: Path, *run_ids: str, **options: Any) -> list[dict[str, Any]]:
    warehouse = Warehouse(root)
    run_ids = run_ids or tuple(warehouse.runs()["run_id"].to_pylist())
    table = compare(warehouse, run_ids, threshold=PUBLISHED, **options).table()
    assert table.schema.equals(SCHEMA)
    return table.to_pylist()


def layers(values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    return (np.arange(len(values)) + 0.5) / len(values), np.array(values)


# Pure functions.


def correlate(a: Scores, b: Scores, **options: float) -> dict[str, Any]:
    columns = correlate_pairs([a, b], np.array([0]), np.array([1]), **options)
    return {name: column[0].item() for name, column in columns.items()}


@pytest.mark.parametrize(("n", "k"), [(8, 2), (6, 3), (5, 5), (4, 1)])
def test_chance_is_that_of_two_random_sets(n: int, k: int) -> None:
    rng = np.random.default_rng(n)
    a = layers(rng.permutation(n) + 1.0)
    b = layers(rng.permutation(n) + 1.0)
    pair = correlate(a, b, share=k / n)
    shared = np.array([len(set(range(k)) & set(other)) for other in combinations(range(n), k)])
    jaccard = shared / (2 * k - shared)
    assert pair["jaccard_by_chance"] == pytest.approx(jaccard.mean())
    is_as_many = shared >= pair["shared"]
    assert pair["p_by_chance"] == pytest.approx(is_as_many.mean())


def given_depth(x: np.ndarray, y: np.ndarray) -> float:
    """The correlation of what a straight line in depth leaves of the ranks of each."""
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 3 or np.ptp(x[both]) == 0 or np.ptp(y[both]) == 0:
        return np.nan
    rest_of_x = without_trend(stats.rankdata(x[both]))
    rest_of_y = without_trend(stats.rankdata(y[both]))
    if np.ptp(rest_of_x) < 1e-6 or np.ptp(rest_of_y) < 1e-6:
        return np.nan
    return float(np.corrcoef(rest_of_x, rest_of_y)[0, 1])


def without_trend(values: np.ndarray) -> np.ndarray:
    """Return values less the straight line through them."""
    depth = np.arange(len(values))
    line = np.polyfit(depth, values, 1)
    return values - np.polyval(line, depth)


def one_by_one(first: Scores, second: Scores) -> dict[str, Any]:
    """Return the columns of a pair as one at a time gives them."""
    x, y, interpolated = align(first, second)
    k = count_lowest(len(x))
    lowest_of_x = np.argsort(x, kind="stable")[:k]
    lowest_of_y = np.argsort(y, kind="stable")[:k]
    shared = len(np.intersect1d(lowest_of_x, lowest_of_y))
    return {
        "layers": len(x),
        "interpolated": interpolated,
        "spearman": spearman(x, y),
        "given_depth": given_depth(x, y),
        "k": k,
        "shared": shared,
        "jaccard": shared / (2 * k - shared),
    }


def test_pairs_at_once_are_what_one_by_one_gives() -> None:
    """Against scipy: ties, constants, other depths, NaN, infinities."""
    rng = np.random.default_rng(0)
    scores = []
    for size in (8, 8, 8, 8, 12, 12, 30, 2, 1):
        scores.append(layers(rng.integers(0, 9, size).astype(float)))
    scores += [layers([1.0] * 8), layers([*UP[:7], np.nan]), layers([*UP[:7], np.inf])]
    a, b = np.triu_indices(len(scores), 1)
    at_once = correlate_pairs(scores, a, b)
    for pair, (i, j) in enumerate(zip(a, b, strict=True)):
        for name, value in one_by_one(scores[i], scores[j]).items():
            assert at_once[name][pair] == pytest.approx(value, nan_ok=True, rel=1e-9, abs=1e-9), (name, i, j)


# Which pairs.


@pytest.fixture(scope="module")
def four_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models on one text, one of them also in bfloat16 and on another text. Not to be changed."""
    warehouse = tmp_path_factory.mktemp("four-runs")
    write_scores(warehouse, "llama-1", UP, model="org/llama", num_parameters=1)
    write_scores(warehouse, "llama-2", MIXED, model="org/llama", dtype="bfloat16")
    write_scores(warehouse, "llama-3", DOWN, model="org/llama", corpus="other.txt")
    write_scores(warehouse, "bert-1", [1.0, 3.0, 2.0, 4.0], model="org/bert", family="bert")
    return warehouse


@pytest.fixture
def root(four_runs: Path, tmp_path: Path) -> Path:
    """A copy of the warehouse of four runs, to change."""
    return Path(shutil.copytree(four_runs, tmp_path, dirs_exist_ok=True))


def sides(pair: dict[str, Any]) -> set[str]:
    """Return what differs between the two sides of a pair."""
    return {pair["a"], pair["b"]}


def runs_of(pair: dict[str, Any]) -> set[str]:
    """Return the runs of a pair."""
    return {pair["a_run_id"], pair["b_run_id"]}


def test_runs_under_the_same_conditions(root: Path) -> None:
    (pair,) = pairs(root, "llama-1", "bert-1")
    assert pair["by"] == "run"
    assert sides(pair) == {"llama-1", "bert-1"}
    assert pair["layers"] == 4
    assert pair["interpolated"] is True


def test_families_under_the_same_conditions(root: Path) -> None:
    (pair,) = pairs(root, "llama-1", "bert-1", by="family")
    assert sides(pair) == {"llama", "bert"}
    assert runs_of(pair) == {"llama-1", "bert-1"}


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        *nightly(
            ({"dtype": "bfloat16"}, r"dtype \(bfloat16, float32\)"),
            ({"sequence_length": 16}, r"sequence_length \(16, 8\)"),
            ({"skip_first_tokens": 1}, r"skip_first_tokens \(0, 1\)"),
        ),
        ({"layout": "padded"}, r"layout \(packed, padded\)"),
        ({"corpus": "b.txt", "dtype": "bfloat16"}, r"corpus \(b.txt, text.txt\); dtype \(bfloat16, float32\)"),
    ],
)
def test_what_is_not_comparable_is_refused_by_name(tmp_path: Path, columns: dict[str, Any], text: str) -> None:
    write_scores(tmp_path, "a", UP)
    write_scores(tmp_path, "b", DOWN, model="org/a", family="gemma", revision="other", **columns)
    for by in ("run", "family", "revision"):
        with pytest.raises(QueryError, match=rf"not comparable: they differ in {text}\.\n.*`allow_mismatch`"):
            pairs(tmp_path, by=by)
    (pair,) = pairs(tmp_path, allow_mismatch=True)
    assert pair["spearman"] == pytest.approx(-1)


def test_of_many_pairs_the_most_and_the_least_alike_are_listed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most, *_, least = column(pairs(root, allow_mismatch=True), "spearman")
    monkeypatch.setattr("avss_dist.analysis.comparison.EXTREMES", 1)
    listed = pairs(root, allow_mismatch=True, max_listed=5)
    assert column(listed, "spearman") == [most, least]


def compare_five(root: Path, **options: Any) -> RankingComparison:
    """Compare two runs that are comparable and three that are not comparable with them."""
    write_profiles(root, "gpt-1", {("mlp", "pooled", PUBLISHED_THRESHOLD): UP})
    run_ids = ["gpt-1", "llama-1", "llama-2", "llama-3", "bert-1"]
    return compare(Warehouse(root), run_ids, threshold=PUBLISHED, **options)


@pytest.mark.parametrize("by", ["run", "family"])
def test_what_is_comparable_is_compared_and_the_rest_is_named(root: Path, by: str) -> None:
    comparison = compare_five(root, by=by)
    (pair,) = comparison.table().to_pylist()
    assert runs_of(pair) == {"llama-1", "bert-1"}
    assert comparison.left_out == {
        "gpt-1": "no scores at this site, recipe and threshold",
        "llama-2": "dtype bfloat16 instead of float32",
        "llama-3": "corpus other.txt instead of text.txt",
    }
    assert comparison.conditions == ("corpus", "dtype")
    assert repr(comparison) == "<RankingComparison: 1 pair, 3 runs left out>"


def test_runs_that_differ_are_left_out_unless_that_is_allowed(root: Path) -> None:
    assert compare_five(root, allow_mismatch=True).left_out.keys() == {"gpt-1"}


def test_a_run_without_a_counterpart_is_named(root: Path) -> None:
    left_out = compare_five(root, by="dtype").left_out
    assert left_out["llama-3"] == "corpus other.txt instead of text.txt"
    assert left_out["bert-1"] == "nothing comparable that differs in dtype alone"


def test_alike_runs_are_compared_within_each_group(tmp_path: Path) -> None:
    """Two groups of two: two pairs of the six, and no run is left out."""
    for name, dtype in (("a", "float32"), ("b", "float32"), ("c", "bfloat16"), ("d", "bfloat16")):
        write_scores(tmp_path, name, UP, dtype=dtype)
    comparison = compare(Warehouse(tmp_path), ["a", "b", "c", "d"], threshold=PUBLISHED)
    first, second = comparison.table().to_pylist()
    assert {frozenset(sides(first)), frozenset(sides(second))} == {frozenset("ab"), frozenset("cd")}
    assert comparison.conditions == ("dtype",)
    assert comparison.left_out == {}


def test_texts_are_known_by_their_content(tmp_path: Path) -> None:
    """The same name of other text is said; the same text under another name is comparable."""
    for name, fingerprint in (("a", "1"), ("b", "1"), ("c", "2")):
        write_scores(tmp_path, name, UP, corpus_fingerprint=fingerprint)
    comparison = compare(Warehouse(tmp_path), ["a", "b", "c"], threshold=PUBLISHED)
    assert comparison.left_out == {"c": "corpus text.txt of other content"}
    write_scores(tmp_path, "d", UP, corpus="copy of text.txt", corpus_fingerprint="2")
    (pair,) = pairs(tmp_path, "c", "d")
    assert pair["spearman"] == pytest.approx(1)


def write_versions(root: Path, run_id: str, **versions: int) -> None:
    """A run whose row has these versions, as another version of this package wrote it."""
    write_scores(root, run_id, UP)
    (file,) = (root / "runs" / f"run_id={run_id}").glob("*.parquet")
    table = pq.ParquetFile(file).read()
    for name in ("schema_version", "numbers_version"):
        place = table.column_names.index(name)
        version = pa.array([versions.get(name)], pa.int32())
        table = table.set_column(place, name, version)
    rewrite_file(file, table)


def test_runs_with_other_columns_are_compared(tmp_path: Path) -> None:
    write_versions(tmp_path, "a", schema_version=3)
    write_versions(tmp_path, "b", schema_version=4, numbers_version=3)
    assert len(pairs(tmp_path)) == 1


def test_runs_whose_numbers_have_another_version_are_not_compared(tmp_path: Path) -> None:
    write_versions(tmp_path, "a", schema_version=3)
    write_versions(tmp_path, "b", schema_version=3, numbers_version=4)
    with pytest.raises(QueryError, match="numbers_version"):
        pairs(tmp_path)


def test_dtypes_are_compared_for_the_same_model(root: Path) -> None:
    (pair,) = pairs(root, by="dtype")
    assert sides(pair) == {"float32", "bfloat16"}
    assert runs_of(pair) == {"llama-1", "llama-2"}


def test_corpora_are_compared_for_the_same_model(root: Path) -> None:
    (pair,) = pairs(root, by="corpus")
    assert sides(pair) == {"text.txt", "other.txt"}
    assert pair["spearman"] == pytest.approx(-1)


def test_revisions_of_a_model(tmp_path: Path) -> None:
    for i, scores in enumerate((UP, MIXED, DOWN)):
        write_scores(tmp_path, f"step-{i}", scores, model="org/llama", revision=f"step{i}")
    write_scores(tmp_path, "other", UP, model="org/other", revision="step9")
    revisions = pairs(tmp_path, by="revision")
    assert [sides(pair) for pair in revisions] == [{"step0", "step1"}, {"step1", "step2"}, {"step0", "step2"}]
    correlations = column(revisions, "spearman")
    assert correlations == sorted(correlations, reverse=True)


def write_seeds(root: Path, *seeds: int | None, **columns: Any) -> None:
    """A checkpoint of each of several seeds. Without a seed, the name of its model does not tell it."""
    for number, seed in enumerate(seeds):
        group = None if seed is None else "org/m-seed*@step*"
        described = {"seed": seed, "seed_group": group, "training_step": 100, **columns}
        run_id = f"{number}-{described['training_step']}"
        write_scores(root, run_id, (UP, MIXED, DOWN)[number], model=f"org/m-seed{seed}", **described)


def test_runs_without_seeds_say_what_tells_a_seed(tmp_path: Path) -> None:
    write_seeds(tmp_path, None, None)
    with pytest.raises(QueryError, match="The seed of no run is known"):
        pairs(tmp_path, by="seed")


def test_seeds_are_compared_at_the_same_step(tmp_path: Path) -> None:
    write_seeds(tmp_path, 1, 2, 3)
    write_seeds(tmp_path, 1, 2, training_step=200)
    by_seed = pairs(tmp_path, by="seed")
    assert sorted(sorted(runs_of(pair)) for pair in by_seed) == [
        ["0-100", "1-100"],
        ["0-100", "2-100"],
        ["0-200", "1-200"],
        ["1-100", "2-100"],
    ]


def test_seeds_of_other_groups_are_not_compared(tmp_path: Path) -> None:
    write_seeds(tmp_path, 1, 2)
    write_scores(tmp_path, "other", UP, model="org/o-seed3", seed=3, seed_group="org/o-seed**", training_step=100)
    (pair,) = pairs(tmp_path, by="seed")
    assert sides(pair) == {"1", "2"}


def test_a_run_without_a_seed_is_left_out_with_the_reason(tmp_path: Path) -> None:
    write_seeds(tmp_path, 1, 2, None)
    result = compare(Warehouse(tmp_path), ["0-100", "1-100", "2-100"], by="seed", threshold=PUBLISHED)
    assert result.left_out["2-100"].startswith("its seed is not known")


@pytest.fixture
def several_profiles(tmp_path: Path) -> Path:
    """A run with profiles of two sites, two recipes and two thresholds, and with other scores."""
    profiles = {
        ("block", "pooled", 1e-5): UP,
        ("block", "element", 1e-5): MIXED,
        ("mlp", "pooled", 1e-5): DOWN,
        ("block", "pooled", 0.1): UP,
    }
    rivals = {"block_influence": DOWN, "angular_distance": UP, "relative_magnitude": MIXED}
    write_profiles(tmp_path, "a", profiles, rivals=rivals)
    return tmp_path


@pytest.mark.parametrize(
    ("by", "names"),
    [("recipe", {"pooled", "element"}), ("site", {"block", "mlp"}), ("threshold", {"1e-05", "0.1"})],
)
def test_what_varies_within_a_run(several_profiles: Path, by: str, names: set[str]) -> None:
    (pair,) = pairs(several_profiles, by=by)
    assert sides(pair) == names


def test_the_other_scores_of_a_run_are_compared_with_avss(several_profiles: Path) -> None:
    scores = pairs(several_profiles, by="score")
    assert column(scores, "a") == ["avss"] * 3
    correlations = mapping(scores, "b", "spearman")
    assert correlations.keys() == {"block_influence", "angular_distance", "relative_magnitude"}
    assert correlations["block_influence"] == pytest.approx(-1)


def test_nothing_to_compare(root: Path) -> None:
    with pytest.raises(QueryError, match=r"No two profiles differ in site alone.\nThere is: block."):
        pairs(root, by="site")
    with pytest.raises(QueryError, match=r"No two profiles differ in run alone.\nThere are no scores"):
        pairs(root, "llama-1", "bert-1", site="neuron")
    with pytest.raises(QueryError, match=r"Unknown score 'block'.\nDid you mean 'block_influence'"):
        pairs(root, score="block")


@pytest.mark.parametrize(("options", "k"), [({}, 2), ({"share": 0.5}, 4), ({"share": 1.0}, 8)])
def test_the_size_of_the_lowest_set(tmp_path: Path, options: dict[str, Any], k: int) -> None:
    write_scores(tmp_path, "a", UP)
    write_scores(tmp_path, "b", UP)
    (pair,) = pairs(tmp_path, **options)
    assert pair["k"] == k
    assert pair["shared"] == k
    assert pair["jaccard"] == 1.0


# The command.


def test_the_table_says_it_in_words(root: Path) -> None:
    printed = succeed("compare", "-w", root, "--run", "llama-1", "--run", "bert*").stdout
    assert "One pair: Spearman 0.8" in printed
    assert "~ models of different depth" in printed
    assert "tracks depth" in printed


def test_a_run_without_a_finding_is_told_as_such(tmp_path: Path) -> None:
    x = activations(scales=np.array([3.0, 1.0, 2.0, 4.0]))
    write_measured(tmp_path, "plain", stats_of(x), 8)
    assert "Nothing to warn of" in avss("findings", "-w", tmp_path).stdout


@pytest.fixture
def rising(tmp_path: Path) -> Path:
    """A warehouse of two runs whose scores follow depth, and in which one unit carries the variance."""
    x = activations(scales=np.arange(1.0, 9.0))
    x[..., 0] *= 300
    for name in ("a", "b"):
        write_measured(tmp_path, name, stats_of(x), 8)
    return tmp_path


def test_a_comparison_tells_only_the_findings_that_concern_it(rising: Path) -> None:
    """A unit that carries the variance is of one run; that a score follows depth changes what its correlations mean."""
    printed = avss("compare", "-w", rising).output
    assert "tracks depth" in printed
    assert "dominant unit" not in printed
    assert f"avss findings -w {rising} lists what else" in " ".join(printed.split())


def test_the_findings_that_concern_a_comparison_depend_on_its_score(rising: Path) -> None:
    every = findings(Warehouse(rising))
    kinds = set(every["kind"].to_pylist())
    assert kinds >= {"dominant_unit", "tracks_depth"}
    of_avss = of_rankings(every, "avss")["kind"].to_pylist()
    assert set(of_avss) == kinds & set(OF_RANKINGS)
    of_block_influence = of_rankings(every, "block_influence")["kind"].to_pylist()
    assert set(of_block_influence) == kinds & {"nonfinite"}


@pytest.mark.parametrize("by", ["run", "family"])
def test_the_command_says_what_it_left_out(root: Path, by: str) -> None:
    result = succeed("compare", "-w", root, "--by", by, "--format", "csv")
    heading, _ = result.stdout.splitlines()
    assert heading == ",".join(SCHEMA.names)
    assert result.stderr == (
        "Only runs with the same corpus, dtype are compared with each other; --allow-mismatch compares all.\n"
        "Left out: llama-2: dtype bfloat16 instead of float32.\n"
        "Left out: llama-3: corpus other.txt instead of text.txt.\n"
    )


def said(rho: float, given: float, *, lowest: float | None = None) -> str:
    """Return the verdict on pairs with a median correlation, and one given depth."""

    def summarized(median: float, least: float) -> CorrelationSummary:
        return CorrelationSummary(count=int(math.isfinite(median)), median=median, lowest=least, highest=median)

    pairs = pa.table({"layers": [8], "k": [2], "shared": [1]})
    spearman = summarized(rho, rho if lowest is None else lowest)
    comparison: Any = SimpleNamespace(number=1, pairs=pairs, spearman=spearman, given_depth=summarized(given, given))
    verdict, shared = summary(comparison).splitlines()
    assert shared == "50% of the lowest layers of one are the lowest of the other; by chance it would be 25%."
    return verdict


@pytest.mark.parametrize(
    ("rho", "given", "verdict"),
    [
        (0.99, 0.98, "the rankings are nearly the same."),
        (0.95, 0.12, "the rankings agree only because both follow depth."),
        (0.95, math.nan, "the rankings agree only because both follow depth."),
        (0.95, 0.6, "the rankings are nearly the same, in part because both follow depth."),
        (0.8, 0.75, "the rankings are alike."),
        (0.1, 0.9, "the rankings differ only in how they follow depth."),
        (0.1, -0.2, "the rankings have little in common."),
        (-1.0, math.nan, "the rankings are the other way round."),
    ],
)
def test_one_verdict_on_rankings_and_their_depth(rho: float, given: float, verdict: str) -> None:
    assert said(rho, given).endswith(f": {verdict}")
    assert said(rho, given).count("the rankings") == 1


def test_a_median_is_between_the_middle_two() -> None:
    rho = np.array([1.0, -1.0, np.nan, -0.0002, -0.0003])
    assert summarize(rho) == CorrelationSummary(count=4, median=pytest.approx(-0.00025), lowest=-1, highest=1)
    assert summarize(np.array([np.nan])).count == 0


def test_a_correlation_that_is_rounded_to_zero_has_no_sign() -> None:
    row = {"by": "run", "a": "a", "b": "b", "a_run_id": "a", "b_run_id": "b", "layers": 8, "interpolated": False}
    row |= {"k": 2, "shared": 1, "jaccard": 0.3, "jaccard_by_chance": 0.2, "p_by_chance": 0.5}
    first = row | {"spearman": -0.0002, "given_depth": -0.0002}
    second = row | {"spearman": -0.0003, "given_depth": -0.0003}
    pairs = pa.Table.from_pylist([first, second], SCHEMA)
    rho = summarize(np.array([-0.0002, -0.0003]))
    comparison = RankingComparison(pairs=pairs, number=2, spearman=rho, given_depth=rho, left_out={})
    console = Console(file=io.StringIO(), width=132, record=True)
    console.print(comparison_tables(comparison, "title"))
    printed = console.export_text()
    assert "0.000 at the median, from 0.000 to 0.000" in printed
    assert "-0.0" not in printed


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--run", "llama-2", "--run", "llama-3"], "not comparable: they differ in corpus"),
        (["--run", "x*"], "No run matches 'x*'."),
        (["--by", "dtyp"], "Unknown --by 'dtyp'.\nDid you mean 'dtype'?"),
        (["--threshold", "x"], "'x' is not a threshold."),
    ],
)
def test_mistakes(root: Path, args: list[str], text: str) -> None:
    result = avss("compare", "-w", root, *args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert text in result.stderr


@pytest.mark.parametrize("command", ["compare", "findings", "show"])
def test_a_warehouse_without_finished_runs(tmp_path: Path, command: str) -> None:
    assert "is not a warehouse" in avss(command, "-w", tmp_path).stderr
    Store(tmp_path).write_run({**run_row("broken"), "status": "failed", "error": "no memory"})
    result = avss(command, "-w", tmp_path)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert f"has no finished run: its only run failed.\navss ls -w {tmp_path} says why." in result.stderr
    assert "Run 'broken' failed: no memory" in avss(command, "-w", tmp_path, "--run", "broken").stderr


def test_a_threshold_that_no_run_counted(tmp_path: Path) -> None:
    for seed in range(2):
        write_measured(tmp_path, f"tiny-{seed}", stats_of(activations(seed)), 8)
    printed = succeed("compare", "-w", tmp_path, "--threshold", 0.3, "--site", "block", "--recipe", "element").stdout
    assert "by run  avss / block / element / |x| < 0.3" in printed


@pytest.mark.nightly
def test_of_many_runs_few_are_told(tmp_path: Path) -> None:
    for i in range(41):
        write_scores(tmp_path, f"tiny-{i:02d}", UP)
    result = avss("compare", "-w", tmp_path, "--run", "tiny-007")
    assert result.exit_code == 2
    unknown, valid = result.stderr.splitlines()
    assert unknown == "Error: Unknown run 'tiny-007'."
    told = ", ".join(f"tiny-{i:02d}" for i in range(10))
    assert valid == f"Did you mean 'tiny-07'? Valid: {told} and 31 more."


def test_progress_is_shown_where_somebody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for run_id in ("a", "b", "c"):
        write_measured(tmp_path, run_id, stats_of(activations()), 8)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    pairs(tmp_path)
    assert "Comparing 3 pairs" in terminal.getvalue()


@pytest.mark.nightly
def test_many_pairs_are_shown_from_both_ends(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(12):
        scores = rng.permutation(8) + 1.0
        write_scores(tmp_path, f"run-{i:02d}", scores.tolist())
    result = avss("compare", "-w", tmp_path)
    assert "26 pairs between the most and the least alike are not shown" in result.stdout
    exported = avss("compare", "-w", tmp_path, "--format", "csv").stdout
    assert len(exported.splitlines()) == 67


@pytest.fixture
def one_odd_run(tmp_path: Path) -> Path:
    """Three runs of a model that agree, one in another dtype that does not, and a run of another family."""
    for run_id in ("a-0", "a-1", "a-2"):
        write_scores(tmp_path, run_id, [1.0, 2.0, 3.0, 4.0], model="org/a")
    write_scores(tmp_path, "a-3", [4.0, 3.0, 2.0, 1.0], model="org/a", dtype="bfloat16")
    write_scores(tmp_path, "b-0", [2.0, 4.0, 1.0, 3.0], model="org/b", family="bert")
    return tmp_path


def test_the_run_that_agrees_least_with_its_like_is_named_with_what_it_differs_in(one_odd_run: Path) -> None:
    """Runs of other families have no part in it."""
    shown = avss("compare", "-w", one_odd_run, "--allow-mismatch").stdout
    text = " ".join(shown.split())
    assert "a · bfloat16 (a-3) agrees least with the other runs of its model: Spearman -1.000 on average" in text
    assert "that of the others 0.333. It differs in dtype (bfloat16, not float32)." in text


def test_of_two_runs_none_is_odd(one_odd_run: Path) -> None:
    shown = succeed("compare", "-w", one_odd_run, "--run", "a-0", "--run", "a-1", "--run", "b-0").stdout
    assert "agrees least" not in shown


def test_of_runs_that_all_agree_alike_none_is_odd(one_odd_run: Path) -> None:
    shown = avss("compare", "-w", one_odd_run, "--run", "a-0", "--run", "a-1", "--run", "a-2").stdout
    assert "3 pairs" in shown
    assert "agrees least" not in shown
