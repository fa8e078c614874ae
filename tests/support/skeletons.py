"""Empty models, with which the configuration of a pruned checkpoint is checked: built once for equal configurations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from avss_dist.core.settings import Settings
from avss_dist.pruning import configuration


@contextmanager
def shared_skeletons() -> Iterator[None]:
    """Let checks of pruned configurations share their empty models, which nothing changes."""
    build = configuration.skeleton_by
    built: dict[tuple[str, ...], Any] = {}

    def shared(auto: Any, config: Any, settings: Settings) -> Any:
        values = config.to_dict()
        values.pop("_name_or_path", None)
        content = json.dumps(values, sort_keys=True, default=str)
        key = (auto.__name__, type(config).__name__, content, str(settings.trust_remote_code))
        if key not in built:
            built[key] = build(auto, config, settings)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configuration, "skeleton_by", shared)
        yield
