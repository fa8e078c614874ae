"""The command line: parse, call, print. Exit codes: 0 done, 1 a run failed, 2 a mistake, 130 stopped by Ctrl-C."""

from avss_dist.cli import (
    ablate,
    compare,
    contrast,
    doctor,
    evaluate,
    experiment,
    jobs,
    plan,
    prune,
    read,
    report,
    sample,
    score,
    shrink,
)
from avss_dist.cli.base import app, main

for command in (
    score.score,
    score.estimate,
    read.show,
    read.plot,
    read.query,
    compare.compare,
    compare.findings,
    contrast.contrast,
    compare.scores,
    compare.quantiles,
    compare.export,
    report.report,
    plan.plan,
    prune.prune,
    shrink.shrink,
    sample.sample,
    evaluate.evaluate,
    experiment.experiment,
    experiment.scorecard,
    ablate.ablate,
    jobs.run,
    jobs.submit,
    jobs.status,
    jobs.logs,
    jobs.stop,
    doctor.doctor,
):
    app.command()(command)

__all__ = ["app", "main"]
