"""Rankings compared: correlations, the lowest sets, depths, what is not comparable; and the command."""

from __future__ import annotations

import io
import math
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
from support.command_line import avss
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
    found = correlate(layers(rng.permutation(n) + 1.0), layers(rng.permutation(n) + 1.0), share=k / n)
    shared = [len(set(range(k)) & set(other)) for other in combinations(range(n), k)]
    assert found["jaccard_by_chance"] == pytest.approx(np.mean([s / (2 * k - s) for s in shared]))
    assert found["p_by_chance"] == pytest.approx(np.mean([s >= found["shared"] for s in shared]))


def given_depth(x: np.ndarray, y: np.ndarray) -> float:
    """The correlation of what a straight line in depth leaves of the ranks of each."""
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 3 or np.ptp(x[both]) == 0 or np.ptp(y[both]) == 0:
        return np.nan
    depth = np.arange(both.sum())
    ranks = [stats.rankdata(values[both]) for values in (x, y)]
    left = [values - np.polyval(np.polyfit(depth, values, 1), depth) for values in ranks]
    return np.nan if min(map(np.ptp, left)) < 1e-6 else float(np.corrcoef(*left)[0, 1])


def test_pairs_at_once_are_what_one_by_one_gives() -> None:
    """Against scipy: ties, constants, other depths, NaN, infinities."""
    rng = np.random.default_rng(0)
    scores = [layers(rng.integers(0, 9, size).astype(float)) for size in (8, 8, 8, 8, 12, 12, 30, 2, 1)]
    scores += [layers([1.0] * 8), layers([*UP[:7], np.nan]), layers([*UP[:7], np.inf])]
    a, b = np.array(list(combinations(range(len(scores)), 2))).T
    found = correlate_pairs(scores, a, b)
    for pair, (i, j) in enumerate(zip(a, b, strict=True)):
        x, y, interpolated = align(scores[i], scores[j])
        order_x = np.argsort(x, kind="stable")
        order_y = np.argsort(y, kind="stable")
        k = count_lowest(len(x))
        shared = len(set(order_x[:k]) & set(order_y[:k]))
        expected = {
            "layers": len(x),
            "interpolated": interpolated,
            "spearman": spearman(x, y),
            "given_depth": given_depth(x, y),
            "k": k,
            "shared": shared,
            "jaccard": shared / (2 * k - shared),
        }
        for name, value in expected.items():
            assert found[name][pair] == pytest.approx(value, nan_ok=True, rel=1e-9, abs=1e-9), (name, i, j)


# Which pairs.


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two models on one text, one of them also in bfloat16 and on another text."""
    write_scores(tmp_path, "llama-1", UP, model="org/llama", num_parameters=1)
    write_scores(tmp_path, "llama-2", MIXED, model="org/llama", dtype="bfloat16")
    write_scores(tmp_path, "llama-3", DOWN, model="org/llama", corpus="other.txt")
    write_scores(tmp_path, "bert-1", [1.0, 3.0, 2.0, 4.0], model="org/bert", family="bert")
    return tmp_path


def test_runs_under_the_same_conditions(root: Path) -> None:
    (pair,) = pairs(root, "llama-1", "bert-1")
    assert (pair["by"], {pair["a"], pair["b"]}) == ("run", {"llama-1", "bert-1"})
    assert (pair["layers"], pair["interpolated"]) == (4, True)
    (family,) = pairs(root, "llama-1", "bert-1", by="family")
    assert {family["a"], family["b"]} == {"llama", "bert"}
    assert {family["a_run_id"], family["b_run_id"]} == {"llama-1", "bert-1"}


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"dtype": "bfloat16"}, r"dtype \(bfloat16, float32\)"),
        ({"sequence_length": 16}, r"sequence_length \(16, 8\)"),
        ({"skip_first_tokens": 1}, r"skip_first_tokens \(0, 1\)"),
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
    every = pairs(root, allow_mismatch=True)
    monkeypatch.setattr("avss_dist.analysis.comparison.EXTREMES", 1)
    listed = pairs(root, allow_mismatch=True, max_listed=5)
    assert len(every) == 6
    assert [row["spearman"] for row in listed] == [every[at]["spearman"] for at in (0, -1)]


def test_what_is_comparable_is_compared_and_the_rest_is_named(root: Path) -> None:
    write_profiles(root, "gpt-1", {("mlp", "pooled", PUBLISHED_THRESHOLD): UP})
    warehouse = Warehouse(root)
    run_ids = ["gpt-1", "llama-1", "llama-2", "llama-3", "bert-1"]
    for by in ("run", "family"):
        comparison = compare(warehouse, run_ids, by=by, threshold=PUBLISHED)
        (pair,) = comparison.table().to_pylist()
        assert {pair["a_run_id"], pair["b_run_id"]} == {"llama-1", "bert-1"}
        assert comparison.left_out == {
            "gpt-1": "no scores at this site, recipe and threshold",
            "llama-2": "dtype bfloat16 instead of float32",
            "llama-3": "corpus other.txt instead of text.txt",
        }
        assert comparison.conditions == ("corpus", "dtype")
    assert repr(comparison) == "<RankingComparison: 1 pair, 3 runs left out>"
    assert compare(warehouse, run_ids, threshold=PUBLISHED, allow_mismatch=True).left_out.keys() == {"gpt-1"}
    by_dtype = compare(warehouse, run_ids, by="dtype", threshold=PUBLISHED)
    assert by_dtype.left_out["llama-3"] == "corpus other.txt instead of text.txt"
    assert by_dtype.left_out["bert-1"] == "nothing comparable that differs in dtype alone"


def test_alike_runs_are_compared_within_each_group(tmp_path: Path) -> None:
    """Two groups of two: two pairs of the six, and no run is left out."""
    for name, dtype in (("a", "float32"), ("b", "float32"), ("c", "bfloat16"), ("d", "bfloat16")):
        write_scores(tmp_path, name, UP, dtype=dtype)
    comparison = compare(Warehouse(tmp_path), ["a", "b", "c", "d"], threshold=PUBLISHED)
    assert sorted(sorted((pair["a"], pair["b"])) for pair in comparison.table().to_pylist()) == [["a", "b"], ["c", "d"]]
    assert (comparison.conditions, comparison.left_out) == (("dtype",), {})


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
        table = table.set_column(place, name, pa.array([versions.get(name)], pa.int32()))
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


def test_corpora_and_dtypes_are_compared_for_the_same_model(root: Path) -> None:
    (pair,) = pairs(root, by="dtype")
    assert ({pair["a"], pair["b"]}, {pair["a_run_id"], pair["b_run_id"]}) == (
        {"float32", "bfloat16"},
        {"llama-1", "llama-2"},
    )
    (pair,) = pairs(root, by="corpus")
    assert {pair["a"], pair["b"]} == {"text.txt", "other.txt"}
    assert pair["spearman"] == pytest.approx(-1)


def test_revisions_of_a_model(tmp_path: Path) -> None:
    for i, scores in enumerate((UP, MIXED, DOWN)):
        write_scores(tmp_path, f"step-{i}", scores, model="org/llama", revision=f"step{i}")
    write_scores(tmp_path, "other", UP, model="org/other", revision="step9")
    found = pairs(tmp_path, by="revision")
    assert [{p["a"], p["b"]} for p in found] == [{"step0", "step1"}, {"step1", "step2"}, {"step0", "step2"}]
    assert [p["spearman"] for p in found] == sorted((p["spearman"] for p in found), reverse=True)


def test_what_varies_within_a_run(tmp_path: Path) -> None:
    keys = [("block", "pooled", 1e-5), ("block", "element", 1e-5), ("mlp", "pooled", 1e-5), ("block", "pooled", 0.1)]
    rivals = {"block_influence": DOWN, "angular_distance": UP, "relative_magnitude": MIXED}
    write_profiles(tmp_path, "a", dict(zip(keys, (UP, MIXED, DOWN, UP), strict=True)), rivals=rivals)
    for by, names in (("recipe", {"pooled", "element"}), ("site", {"block", "mlp"}), ("threshold", {"1e-05", "0.1"})):
        (pair,) = pairs(tmp_path, by=by)
        assert {pair["a"], pair["b"]} == names
    scores = pairs(tmp_path, by="score")
    found = {(p["a"], p["b"]): p["spearman"] for p in scores}
    assert set(found) == {("avss", name) for name in rivals}
    assert found["avss", "block_influence"] == pytest.approx(-1)


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
    assert {(p["k"], p["shared"], p["jaccard"]) for p in pairs(tmp_path, **options)} == {(k, k, 1.0)}


# The command.


def test_the_table_says_it_in_words(root: Path) -> None:
    result = avss("compare", "-w", root, "--run", "llama-1", "--run", "bert*")
    assert result.exit_code == 0
    assert "One pair: Spearman 0.8" in result.stdout
    assert "~ models of different depth" in result.stdout
    assert "tracks depth" in result.stdout


def test_a_run_without_a_finding_is_told_as_such(tmp_path: Path) -> None:
    write_measured(tmp_path, "plain", stats_of(activations(scales=np.array([3.0, 1.0, 2.0, 4.0]))), 8)
    assert "Nothing to warn of" in avss("findings", "-w", tmp_path).stdout


def test_a_comparison_tells_only_the_findings_that_concern_it(tmp_path: Path) -> None:
    """A unit that carries the variance is of one run; that a score follows depth changes what its correlations mean."""
    x = activations(scales=np.arange(1.0, 9.0))
    x[..., 0] *= 300
    for name in ("a", "b"):
        write_measured(tmp_path, name, stats_of(x), 8)
    every = findings(Warehouse(tmp_path)).to_pylist()
    assert {"dominant_unit", "tracks_depth"} <= {row["kind"] for row in every}
    result = avss("compare", "-w", tmp_path)
    assert "tracks depth" in result.stdout
    assert "dominant unit" not in result.stdout
    assert f"avss findings -w {tmp_path} lists what else" in " ".join(result.output.split())
    table = findings(Warehouse(tmp_path))
    kinds = [set(of_rankings(table, score)["kind"].to_pylist()) for score in ("avss", "block_influence")]
    assert kinds[0] == {row["kind"] for row in every} & set(OF_RANKINGS)
    assert kinds[1] == {row["kind"] for row in every} & {"nonfinite"}


@pytest.mark.parametrize("by", ["run", "family"])
def test_the_command_says_what_it_left_out(root: Path, by: str) -> None:
    result = avss("compare", "-w", root, "--by", by, "--format", "csv")
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 2)
    assert result.stdout.splitlines()[0] == ",".join(SCHEMA.names)
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


def test_a_median_is_between_the_middle_two_and_zero_has_no_sign() -> None:
    rho = np.array([1.0, -1.0, np.nan, -0.0002, -0.0003])
    assert summarize(rho) == CorrelationSummary(count=4, median=pytest.approx(-0.00025), lowest=-1, highest=1)
    assert summarize(np.array([np.nan])).count == 0
    row = {"by": "run", "a": "a", "b": "b", "a_run_id": "a", "b_run_id": "b", "layers": 8, "interpolated": False}
    row |= {"k": 2, "shared": 1, "jaccard": 0.3, "jaccard_by_chance": 0.2, "p_by_chance": 0.5}
    rows = [row | dict.fromkeys(("spearman", "given_depth"), value) for value in (-0.0002, -0.0003)]
    rho = summarize(np.array([-0.0002, -0.0003]))
    comparison = RankingComparison(
        pairs=pa.Table.from_pylist(rows, SCHEMA), number=2, spearman=rho, given_depth=rho, left_out={}
    )
    console = Console(file=(output := io.StringIO()), width=132)
    console.print(comparison_tables(comparison, "title"))
    assert "0.000 at the median, from 0.000 to 0.000" in output.getvalue()
    assert "-0.0" not in output.getvalue()


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
    assert (result.exit_code, result.stdout) == (2, "")
    assert text in result.stderr


@pytest.mark.parametrize("command", ["compare", "findings", "show"])
def test_a_warehouse_without_finished_runs(tmp_path: Path, command: str) -> None:
    assert "is not a warehouse" in avss(command, "-w", tmp_path).stderr
    Store(tmp_path).write_run({**run_row("broken"), "status": "failed", "error": "no memory"})
    result = avss(command, "-w", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"has no finished run: its only run failed.\navss ls -w {tmp_path} says why." in result.stderr
    assert "Run 'broken' failed: no memory" in avss(command, "-w", tmp_path, "--run", "broken").stderr


def test_a_threshold_that_no_run_counted(tmp_path: Path) -> None:
    for seed in range(2):
        write_measured(tmp_path, f"tiny-{seed}", stats_of(activations(seed)), 8)
    result = avss("compare", "-w", tmp_path, "--threshold", 0.3, "--site", "block", "--recipe", "element")
    assert result.exit_code == 0
    assert "by run  avss / block / element / |x| < 0.3" in result.stdout


def test_of_many_runs_few_are_told(tmp_path: Path) -> None:
    for i in range(41):
        write_scores(tmp_path, f"tiny-{i:02d}", UP)
    result = avss("compare", "-w", tmp_path, "--run", "tiny-007")
    told = ", ".join(f"tiny-{i:02d}" for i in range(10))
    assert result.exit_code == 2
    assert result.stderr == f"Error: Unknown run 'tiny-007'.\nDid you mean 'tiny-07'? Valid: {told} and 31 more.\n"


def test_progress_is_shown_where_somebody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for run_id in ("a", "b", "c"):
        write_measured(tmp_path, run_id, stats_of(activations()), 8)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    pairs(tmp_path)
    assert "Comparing 3 pairs" in terminal.getvalue()


def test_many_pairs_are_shown_from_both_ends(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(12):
        write_scores(tmp_path, f"run-{i:02d}", list(rng.permutation(8) + 1.0))
    result = avss("compare", "-w", tmp_path)
    assert "26 pairs between the most and the least alike are not shown" in result.stdout
    assert len(avss("compare", "-w", tmp_path, "--format", "csv").stdout.splitlines()) == 67


def test_the_run_that_agrees_least_with_its_like_is_named_with_what_it_differs_in(tmp_path: Path) -> None:
    """Runs of other families have no part in it. With two runs, or runs that all agree alike, none is odd."""
    for i in range(4):
        scores = [1.0, 2.0, 3.0, 4.0] if i < 3 else [4.0, 3.0, 2.0, 1.0]
        write_scores(tmp_path, f"a-{i}", scores, model="org/a", dtype="float32" if i < 3 else "bfloat16")
    write_scores(tmp_path, "b-0", [2.0, 4.0, 1.0, 3.0], model="org/b", family="bert")
    shown = avss("compare", "-w", tmp_path, "--allow-mismatch").stdout
    text = " ".join(shown.split())
    assert "a · bfloat16 (a-3) agrees least with the other runs of its model: Spearman -1.000 on average" in text
    assert "that of the others 0.333. It differs in dtype (bfloat16, not float32)." in text
    two = avss("compare", "-w", tmp_path, "--run", "a-0", "--run", "a-1", "--run", "b-0").stdout
    assert "agrees least" not in two
    alike = avss("compare", "-w", tmp_path, "--run", "a-0", "--run", "a-1", "--run", "a-2").stdout
    assert "3 pairs" in alike
    assert "agrees least" not in alike
