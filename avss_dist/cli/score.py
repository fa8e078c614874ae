"""`avss score` and `avss estimate`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from avss_dist.cli.base import spelled
from avss_dist.cli.options import TEXT_FORMATS, TextFormatOption, format_option, takes
from avss_dist.core.settings import SITES, Settings
from avss_dist.requests import EstimateRequest, ScoreAllRequest
from avss_dist.system.streams import console, emit, emit_json, say

if TYPE_CHECKING:
    from avss_dist.runs.api import Run


@takes(ScoreAllRequest)
def score(format: TextFormatOption = TEXT_FORMATS[0], **values: Any) -> int:
    """Score every layer of one or more models on a corpus, and keep the result as Parquet."""
    from avss_dist.report.terminal.progress import run_progress
    from avss_dist.runs.api import score as score_one
    from avss_dist.runs.api import score_all

    models = values.pop("models")
    with run_progress(len(models), ends=False) as progress:
        if len(models) == 1:
            runs = [score_one(models[0], on_event=progress, **values)]
        else:
            runs = score_all(models, on_event=progress, **values)
    for run in runs:
        if format == "json":
            emit_json(asdict(run))
        else:
            emit(_outcome(run))
    done = [run for run in runs if run.status != "failed"]
    if done and format != "json":
        sites = Settings(sites=values["sites"]).sites if values.get("sites") else SITES
        site = "" if SITES[0] in sites else f" --site {sites[0]}"
        say(f"Look at it: avss show -w {done[-1].warehouse} --run {done[-1].run_id}{site}")
        if len(done) > 1:
            say(f"Compare them: avss compare -w {done[-1].warehouse}{site}")
    return 0 if len(done) == len(runs) else 1


@takes(EstimateRequest)
def estimate(format: Annotated[str, format_option("table", "json")] = "table", **values: Any) -> None:
    """Estimate the memory of a run with every partition, before loading any weights."""
    from avss_dist.api.measure import estimate as estimate_run
    from avss_dist.report.terminal.previews import estimate_table

    result = estimate_run(**values)
    if format == "json":
        emit_json(result.as_dict(), indent=2)
    else:
        console().print(estimate_table(result))


def _outcome(run: Run) -> str:
    if run.status == "failed":
        return f"{run.run_id}: failed. {spelled(str(run.error))}"
    if run.status == "skipped":
        return f"{run.run_id}: done before, nothing to do (--fresh measures again)."
    resumed = f", {run.resumed_shards} of {run.num_shards} shards from before" if run.resumed_shards else ""
    return f"{run.run_id}: {run.num_tokens:,} tokens in {run.seconds:.1f} s{resumed}."
