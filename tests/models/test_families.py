"""Every family that transformers knows: a tiny random model of each is built, observed and scored."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support.documentation import DOCS, read
from support.families import model_types, tiny_batch, tiny_model

from avss_dist.errors import ModelError
from avss_dist.measure.hooks import observe
from avss_dist.models.loading import Backbone, forward_function, open_module
from avss_dist.settings import SITES, THRESHOLDS
from avss_dist.stats.scores import score_run

pytestmark = pytest.mark.slow

# Families that are built and cannot be scored, with the reason that the user is told.
REFUSED = {
    ("causal", "blt"): "several module lists run",
    ("causal", "cpmant"): "pads, pools or extends its rows",
    ("causal", "hrm_text"): "several module lists run",
    ("causal", "prophetnet"): "pads, pools or extends its rows",
    ("causal", "xlm"): "several module lists run",
    ("masked", "bart"): "encoder-decoder",
    ("masked", "flaubert"): "several module lists run",
    ("masked", "funnel"): "does not run on token ids alone",
    ("masked", "longformer"): "pads, pools or extends its rows",
    ("masked", "mbart"): "encoder-decoder",
    ("masked", "mvp"): "encoder-decoder",
    ("masked", "perceiver"): "does not run on token ids alone",
    ("masked", "squeezebert"): "no module list holds whole blocks",
    ("masked", "xlm"): "several module lists run",
}


@dataclass(frozen=True)
class Outcome:
    kind: str
    family: str
    built: bool
    refused: str | None = None
    sites: tuple[str, ...] = ()


def score_family(kind: str, family: str) -> Outcome:
    """Build, observe and score one family; what is wrong with a scored one raises AssertionError."""
    try:
        model = tiny_model(kind, family)
    except Exception:  # the library refuses its own configuration, in whatever way
        return Outcome(kind, family, built=False)
    try:
        backbone = open_module(model)
        run = forward_function(backbone.module)
        stats = observe_twice(backbone, run, tiny_batch())
    except ModelError as error:
        return Outcome(kind, family, built=True, refused=str(error))
    layers = [layer.name for layer in backbone.structure.layers]
    rows = score_run(stats, layers)
    block = [r for r in rows if (r["site"], r["recipe"], r["threshold"]) == ("block", "pooled", 1e-5)]
    assert len(block) == len(layers)
    assert all(np.isfinite(r["avss_smoothed"]) for r in block)
    assert sorted(r["rank"] for r in block) == list(range(1, len(layers) + 1))
    return Outcome(kind, family, built=True, sites=tuple(s for s in SITES if any(site == s for _, site in stats)))


def observe_twice(backbone: Backbone, run: Callable, input_ids: torch.Tensor) -> dict:
    """Observe one batch; the hooks must change no bit of the output, see every token, and be gone afterwards."""
    with torch.no_grad():
        before = last_hidden(run(input_ids, None))
        with (
            observe(backbone.structure.layers, SITES, THRESHOLDS) as observer,
            observer.batch(np.ones(input_ids.shape, bool)),
        ):
            during = last_hidden(run(input_ids, None))
    stats = observer.result()
    assert torch.equal(before, during) or not backbone_is_deterministic(run, input_ids)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.module.modules())
    for (_, site), s in stats.items():
        assert s.count + s.nonfinite_count > 0 and (s.count + s.nonfinite_count) % input_ids.numel() == 0, site
        assert s.sequence_count == len(input_ids)
    return stats


def backbone_is_deterministic(run: Callable, input_ids: torch.Tensor) -> bool:
    return torch.equal(last_hidden(run(input_ids, None)), last_hidden(run(input_ids, None)))


def last_hidden(output: object) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else next(iter(output.values()))  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [score_family(kind, family) for kind, family in model_types("causal", "masked")]


def test_the_table(outcomes: list[Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    """At least 95% of the causal families that a small config can build are scored; every refusal has its reason."""
    with capsys.disabled():
        print()
        for kind in ("causal", "masked"):
            mine = [o for o in outcomes if o.kind == kind]
            built = [o for o in mine if o.built]
            passed = [o for o in built if not o.refused]
            print(f"{kind}: {len(passed)} passed / {len(built)} instantiable / {len(mine)} in transformers")
            print(f"  refused: {', '.join(o.family for o in built if o.refused)}")
            print(f"  not built: {', '.join(o.family for o in mine if not o.built)}")
    causal = [o for o in outcomes if o.kind == "causal" and o.built]
    assert len(causal) >= 148
    assert sum(not o.refused for o in causal) >= 0.95 * len(causal)
    for outcome in outcomes:
        reason = REFUSED.get((outcome.kind, outcome.family))
        if outcome.refused:
            assert reason and reason in outcome.refused, outcome


def test_common_families_have_every_site(outcomes: list[Outcome]) -> None:
    sites = {(o.kind, o.family): o.sites for o in outcomes}
    for family in ("llama", "gemma3_text", "qwen3", "mistral", "gpt2", "gpt_neox", "opt", "phi", "falcon", "bloom"):
        if ("causal", family) in sites:
            assert sites["causal", family] == SITES, family
    for family in ("bert", "distilbert", "roberta", "modernbert"):
        assert sites["masked", family] == SITES, family


def test_the_documentation_says_the_number(outcomes: list[Outcome]) -> None:
    causal = [o for o in outcomes if o.kind == "causal"]
    built = [o for o in causal if o.built]
    said = f"{sum(not o.refused for o in built)} of the {len(built)}"
    assert said in read(DOCS / "cli.md")
