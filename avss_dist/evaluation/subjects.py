"""Models and plans as users name them: read from files, and compared with the present state of their models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from avss_dist.core.errors import AvssError, ConfigError, ModelError
from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.registry import SEARCHES
from avss_dist.core.settings import Settings
from avss_dist.evaluation.held_out import SeenText, texts_of_run, texts_of_search
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.models.layers import is_linear, layer_lists, linear_sizes
from avss_dist.models.loading import without_head
from avss_dist.models.size import Footprint, footprint, load_skeleton
from avss_dist.pruning.model_card import pruned_from
from avss_dist.pruning.plan import read_plan
from avss_dist.pruning.selection import PlanError
from avss_dist.sparsity.plan import SparsityPlan, is_sparsity_plan, read_sparsity_plan
from avss_dist.warehouse.checks import settings_of
from avss_dist.warehouse.reader import Warehouse

_ANOTHER_MODEL = "Is it a plan for another model? Score this one, and make a plan of its own."


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to evaluate, and what is changed in it.

    Attributes:
        label: name that people know it by.
        intervention: the change, of the plans that the subject was read from.
        run_id: the run whose scores a plan was made of; its text is not held out.
        search: the evaluation that searched the layers of a plan; its text is not held out, either.
        base: the model that a pruned checkpoint was made of, beside which it is evaluated.
        sparsity_plan: the plan of its sparsity.
    """

    checkpoint: Checkpoint
    label: str
    intervention: Intervention = NO_INTERVENTION
    run_id: str | None = None
    search: str | None = None
    base: Checkpoint | None = None
    sparsity_plan: SparsityPlan | None = field(default=None, compare=False, repr=False)

    def seen_texts(self, store: Warehouse) -> Iterator[SeenText]:
        """Yield the texts that its plans have seen, which are not held out."""
        yield from texts_of_run(store, self.run_id, self.checkpoint)
        yield from texts_of_search(store, self.search, self.checkpoint)


def read_subject(text: str, settings: Settings) -> Subject:
    """Return a model, or the plan of a file, with the checkpoint that it is for.

    Args:
        settings: whether code of a checkpoint is trusted, and the path of its layer list.

    Raises:
        AvssError: there is no such model or file, or the plan contradicts what its model is now.
    """
    trust_remote_code = settings.trust_remote_code
    if not text.endswith((".yaml", ".yml")):
        return Subject(checkpoint=resolve(text, trust_remote_code=trust_remote_code), label=text)
    if is_sparsity_plan(text):
        sparse = read_sparsity_plan(text)
        checkpoint = _checkpoint_of(sparse.model, sparse.revision, text, trust_remote_code=trust_remote_code)
        require_same_layers(checkpoint, text, sparse.num_layers, None, settings)
        require_same_maps(checkpoint, text, sparse, settings)
        return Subject(
            checkpoint=checkpoint,
            label=text,
            intervention=sparse.intervention,
            run_id=sparse.run_id,
            sparsity_plan=sparse,
        )
    made = read_plan(text)
    checkpoint = _checkpoint_of(made.model, made.revision, text, trust_remote_code=trust_remote_code)
    require_same_layers(checkpoint, text, made.num_layers, made.layers, settings)
    search = str(made.why.get("evaluation", "")) if made.why.get("by") in SEARCHES else None
    return Subject(checkpoint=checkpoint, label=text, intervention=made.intervention, run_id=made.run_id, search=search)


def with_bases(
    subjects: Sequence[Subject], base: str | None, *, trust_remote_code: bool = False
) -> tuple[list[Subject], list[str]]:
    """Return subjects with the base models of those that are checkpoints, and findings about those without.

    Args:
        base: the base model; by default that of the model card that `pruning.checkpoint.prune` has written.

    Raises:
        ConfigError: a base model is given, and all subjects are plans.
        AvssError: the base model that is given cannot be opened.
    """
    alone = [subject for subject in subjects if not subject.intervention]
    if base is not None:
        if not alone:
            raise ConfigError("`base` has no effect on plans, which name their own models.", "Leave it out.")
        named = resolve(base, trust_remote_code=trust_remote_code)
        return _with(subjects, dict.fromkeys(alone, named)), []
    found = {subject: _base_of(subject, trust_remote_code=trust_remote_code) for subject in alone}
    bases = {subject: base_model for subject, base_model in found.items() if isinstance(base_model, Checkpoint)}
    return _with(subjects, bases), [finding for finding in found.values() if isinstance(finding, str)]


def _with(subjects: Sequence[Subject], bases: Mapping[Subject, Checkpoint]) -> list[Subject]:
    different = {one: base for one, base in bases.items() if base.revision != one.checkpoint.revision}
    return [replace(one, base=different.get(one)) for one in subjects]


def _base_of(subject: Subject, *, trust_remote_code: bool) -> Checkpoint | str | None:
    """Return the base model that a checkpoint's card names, a finding if it is not found, None for other models."""
    folder = subject.checkpoint.folder
    if not folder.is_dir() or (card := pruned_from(folder)) is None:
        return None
    name, revision = card
    beside = folder.parent / name
    hint = f"name it with `base` to see what {subject.label} keeps."
    try:
        found = resolve(str(beside) if beside.is_dir() else name, trust_remote_code=trust_remote_code)
    except AvssError:
        return f"{name}, the base model of {subject.label}, is not found: {hint}"
    if found.revision != revision:
        return f"{name} is at {found.revision[:12]}, and {subject.label} was made of it at {revision[:12]}: {hint}"
    return found


def _checkpoint_of(model: str, revision: str | None, text: str, *, trust_remote_code: bool) -> Checkpoint:
    """Return the checkpoint that a plan's file is for.

    Raises:
        AvssError: it does not exist, or has changed.
    """
    try:
        checkpoint = resolve(model, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise ModelError(f"{text}: the key 'model' names no checkpoint: {error.message}", error.hint) from error
    if revision is not None and revision != checkpoint.revision:
        raise PlanError(
            f"{text} is for {model} at {revision[:12]}; it is at {checkpoint.revision[:12]} now.",
            "Score it again, and make a plan of its own.",
        )
    return checkpoint


def require_same_layers(
    checkpoint: Checkpoint, file: str, num_layers: int, layers: str | None, settings: Settings
) -> None:
    """Refuse the plan of a file whose layers are not those of its model.

    A model that cannot be built without its weights is not checked here; it refuses layers that it does not have.

    Args:
        num_layers, layers: values of the file; ``layers`` is None if the file has none.

    Raises:
        PlanError: the layers differ; the message has those of the plan and of the model.
    """
    known = {path: len(modules) for path, modules in _layer_lists(checkpoint, settings).items()}
    if not known:
        return
    if layers is not None and layers not in known:
        paths = " or ".join(f"'{path}'" for path in known)
        raise PlanError(
            f"{file}: the key 'layers' is '{layers}', and the layers of {checkpoint.name} are {paths}.",
            "Write that in the file; or, if the plan means another list of modules, name it with `layers`.",
        )
    numbers = {known[layers]} if layers is not None else {*known.values()}
    if num_layers not in numbers:
        raise PlanError(
            f"{file}: the key 'num_layers' is {num_layers}, and {checkpoint.name} has "
            f"{' or '.join(map(str, sorted(numbers)))} layers.",
            _ANOTHER_MODEL,
        )


def require_same_maps(checkpoint: Checkpoint, file: str, plan: SparsityPlan, settings: Settings) -> None:
    """Refuse the sparsity plan of a file whose linear maps are not those of its model.

    A model that cannot be built without its weights is not checked here; it refuses maps that it does not have. Nor is
    one with several lists of modules that may be its layers.

    Raises:
        PlanError: the message names the first such map, with its shape in the plan and in the model.
    """
    lists = [modules for modules in _layer_lists(checkpoint, settings).values() if len(modules) == plan.num_layers]
    if len(lists) != 1:
        return
    for index, one in enumerate(plan.projections):
        where = f"{file}: map {index + 1} of the key 'projections', '{one.map}' of layer {one.layer},"
        try:
            module = lists[0][one.layer].get_submodule(one.map)
        except AttributeError:
            raise PlanError(f"{where} is not in {checkpoint.name}.", _ANOTHER_MODEL) from None
        if not is_linear(module):  # an activation that gates the MLP
            continue
        inputs, outputs = linear_sizes(module)
        if (inputs, outputs) != (one.inputs, one.outputs):
            raise PlanError(
                f"{where} has {one.inputs} inputs and {one.outputs} outputs, and in {checkpoint.name} {inputs} and "
                f"{outputs}.",
                _ANOTHER_MODEL,
            )


@lru_cache(maxsize=16)
def _layer_lists(checkpoint: Checkpoint, settings: Settings) -> dict[str, nn.ModuleList]:
    """Return the module lists that may be a checkpoint's layers, by path, without weights; none if it is not built."""
    with suppress(ModelError):
        _, model, _ = load_skeleton(checkpoint, settings)
        number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        return layer_lists(without_head(model), number, settings.layers)
    return {}


def read_subjects(names: Sequence[str], sparse: str | None, settings: Settings) -> list[Subject]:
    """Return the subjects of these names, each followed by the same with a sparsity plan on top, if there is one.

    Args:
        sparse: file of the sparsity plan.

    Raises:
        AvssError: a model or plan cannot be read; or ``sparse`` is no sparsity plan, or for another model.
    """
    subjects = [read_subject(name, settings) for name in names]
    return subjects if sparse is None else _with_sparsity(subjects, sparse, settings)


def _with_sparsity(subjects: Sequence[Subject], plan: str, settings: Settings) -> list[Subject]:
    sparse = read_subject(plan, settings)
    if sparse.sparsity_plan is None:
        raise PlanError(f"{plan} is no sparsity plan.", "avss sparsify makes one.")
    for subject in subjects:
        if subject.checkpoint.revision != sparse.checkpoint.revision:
            raise PlanError(
                f"{plan} is for {sparse.checkpoint.name}, and {subject.label} is another model.",
                "Make a plan for each model.",
            )
    sparsity = sparse.intervention.sparsity
    on_top = {
        subject: replace(
            subject,
            label=f"{subject.label} + {plan}",
            intervention=replace(subject.intervention, sparsity=sparsity),
            sparsity_plan=sparse.sparsity_plan,
        )
        for subject in subjects
    }
    return [one for subject in subjects for one in (subject, on_top[subject])]


def checkpoint_of_run(run: Mapping[str, Any], *, trust_remote_code: bool) -> Checkpoint:
    """Return the unchanged checkpoint of a row of ``runs``.

    Raises:
        PlanError: it has changed.
    """
    model, revision = str(run["model"]), run["revision"] or ""
    hub_commit = len(revision) == 40
    checkpoint = resolve(f"{model}@{revision}" if hub_commit else model, trust_remote_code=trust_remote_code)
    if checkpoint.revision != revision:
        raise PlanError(
            f"{run['run_id']} is of {model} at {revision[:12]}; it is at {checkpoint.revision[:12]} now.",
            "Score it again.",
        )
    return checkpoint


def run_size(run: Mapping[str, Any]) -> Footprint:
    """Return the size of the checkpoint of a row of ``runs``, from its headers; of a hub id, the hub is queried.

    Raises:
        ModelError: there is no such checkpoint any more, or it cannot be read.
    """
    model, settings = run["model"], settings_of(run)
    kept = {name: settings[name] for name in ("dequantize", "layers", "trust_remote_code") if settings.get(name)}
    kept["dtype"] = run["dtype"] or "auto"
    named = model if Path(model).expanduser().exists() else f"{model}@{run['revision']}"
    return footprint(named, Settings(**kept))


def known_size(run: Mapping[str, Any]) -> Footprint | None:
    """Return the size of a run's checkpoint on this machine; None for other checkpoints, or if it cannot be read."""
    if not Path(run["model"]).expanduser().exists():
        return None
    try:
        return run_size(run)
    except AvssError:
        return None
