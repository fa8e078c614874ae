"""Commands that measure more of the checkpoint of a run, for hints of messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from avss_dist.core.settings import TEXT_OPTIONS, Settings
from avss_dist.core.suggestions import command_line, option_words
from avss_dist.core.values import TableRow
from avss_dist.plans.criteria import LEAVE_ONE_OUT
from avss_dist.stats.catalog import SCORES
from avss_dist.warehouse.checks import checkpoint_name, settings_of
from avss_dist.warehouse.reader import Warehouse

_OF_MODEL = ("dtype", "layers", "attention", "device", "trust_remote_code", "dequantize")
_REPEATED = (*TEXT_OPTIONS, "batch_size", *_OF_MODEL)
_OF_STATISTICS = ("skip_first_tokens", "allow_pickle")
"""Options that avss score alone has."""


def describe_headless(run: TableRow) -> str:
    """Return a sentence that says why avss ablate and avss evaluate refuse the model of a run."""
    return f"{run['model']} ({run['architecture']}) predicts no next token: avss ablate and avss evaluate refuse it."


def ablate_command(store: Warehouse, run: TableRow, by: str = LEAVE_ONE_OUT) -> str:
    """Return the command that measures a score alone for a run's checkpoint, on the run's text."""
    return repeated_command("ablate", store, run, SCORES[by].ablate)


def repeated_command(verb: str, store: Warehouse, run: TableRow, measures: Mapping[str, object] | None = None) -> str:
    """Return the `avss` command of a verb that measures more of a run's checkpoint, opened and on rows as in the run.

    Args:
        measures: what to measure, as values of options by field.
    """
    repeated = repeated_options(run)
    if verb == "score":
        repeated |= _set_options(run, _OF_STATISTICS)
    options = option_words(repeated | dict(measures or {}))
    return command_line(verb, checkpoint_name(run), "--corpus", run["corpus"], "--warehouse", store.root, *options)


def repeated_options(run: TableRow, request: object = None) -> dict[str, object]:
    """Return the options by field that read rows and open the model as a run did, without those at their defaults.

    Args:
        request: a request, whose own options for opening the model replace those of the run.
    """
    options = _set_options(run, _REPEATED)
    defaults = vars(Settings())
    for name in _OF_MODEL:
        value = getattr(request, name, None)
        if value not in (None, defaults[name]):
            options[name] = value
    return options


def _set_options(run: TableRow, names: Sequence[str]) -> dict[str, object]:
    """Return those settings of a run that differ from their defaults, by name.

    A run always stores the device that it used. It is repeated if it was a CPU, which all machines have.
    """
    settings = settings_of(run)
    defaults = vars(Settings())
    options = {}
    for name in names:
        value = settings.get(name)
        if value not in (None, defaults[name]) and (name, value) != ("device", "cuda"):
            options[name] = value
    return options
