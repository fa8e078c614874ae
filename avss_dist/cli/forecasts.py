"""Output of `--dry-run`: what a command would do."""

from __future__ import annotations

from avss_dist.evaluation.forecast import Forecast
from avss_dist.reports.output import print_result
from avss_dist.reports.terminal.forecast import forecast_table


def print_forecast(forecast: Forecast, format: str) -> None:
    """Print what a command would do."""
    print_result(format, map(forecast_table, [forecast]), forecast.table)
