"""What is evaluated: a model, or the plan of a file, of layers or of sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache

from avss_dist.errors import AvssError, ConfigError, ModelError
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.models.layers import layer_lists
from avss_dist.models.loading import without_head
from avss_dist.models.size import load_skeleton
from avss_dist.models.sparsifying import Cut, Sparsity
from avss_dist.pruning.model_card import pruned_from
from avss_dist.pruning.plan import read_plan
from avss_dist.pruning.selection import PlanError
from avss_dist.settings import SEARCHES, Settings
from avss_dist.sparsity.plan import SparsityPlan, is_sparsity_plan, read_sparsity_plan


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated: a model, and the layers and sublayers that are left out of it.

    Attributes:
        label: what people call it.
        run_id: the run whose scores chose the layers; its text is no text to evaluate on.
        search: the evaluation that searched them; nor is its text.
        sparsity: what becomes zero in it.
        base: the model that a pruned checkpoint was made of, beside which it is evaluated.
        sparsity_plan: the plan that says so.
    """

    checkpoint: Checkpoint
    label: str
    drop: tuple[int, ...] = ()
    run_id: str | None = None
    search: str | None = None
    sparsity: Sparsity | None = None
    base: Checkpoint | None = None
    sparsity_plan: SparsityPlan | None = field(default=None, compare=False, repr=False)


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
        return Subject(
            checkpoint=checkpoint, label=text, run_id=sparse.run_id, sparsity=runtime(sparse), sparsity_plan=sparse
        )
    made = read_plan(text)
    checkpoint = _checkpoint_of(made.model, made.revision, text, trust_remote_code=trust_remote_code)
    require_same_layers(checkpoint, text, made.num_layers, made.layers, settings)
    search = str(made.why.get("evaluation", "")) if made.why.get("by") in SEARCHES else None
    return Subject(checkpoint=checkpoint, label=text, drop=made.removed, run_id=made.run_id, search=search)


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
    alone = [subject for subject in subjects if not subject.drop and subject.sparsity is None]
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
    """Return the base model that a checkpoint's card names, a finding where it is not found, None of other models."""
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
    """The checkpoint that a plan's file is for.

    Raises:
        AvssError: there is none such, or it has changed.
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
        num_layers, layers: what the file says. ``layers`` is None where it says none.

    Raises:
        PlanError: the message has what the plan says and what the model has.
    """
    known = _layer_lists(checkpoint, settings)
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
            "Is it a plan for another model? Score this one, and make a plan of its own.",
        )


@lru_cache(maxsize=16)
def _layer_lists(checkpoint: Checkpoint, settings: Settings) -> dict[str, int]:
    """Return path and length of each module list that may be a checkpoint's layers; nothing if it cannot be built."""
    with suppress(ModelError):
        _, model, _ = load_skeleton(checkpoint, settings)
        number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        return {path: len(found) for path, found in layer_lists(without_head(model), number, settings.layers).items()}
    return {}


def runtime(plan: SparsityPlan) -> Sparsity:
    """What a sparsity plan makes zero, as an open model takes it."""
    kept, group = plan.group
    cuts = [
        Cut(
            layer=one.layer,
            path=one.map,
            outputs=one.outputs,
            inputs=one.inputs,
            by=one.by,
            value=one.value,
            center=one.center,
            weighted=plan.weighted,
            kept=kept,
            group=group,
        )
        for one in plan.projections
    ]
    return Sparsity(cuts=tuple(cuts), rule=plan.rule)


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
    if sparse.sparsity is None:
        raise PlanError(f"{plan} is no sparsity plan.", "avss plan --sparsify makes one.")
    for subject in subjects:
        if subject.checkpoint.revision != sparse.checkpoint.revision:
            raise PlanError(
                f"{plan} is for {sparse.checkpoint.name}, and {subject.label} is another model.",
                "Make a plan for each model.",
            )
    on_top = {
        s: replace(s, label=f"{s.label} + {plan}", sparsity=sparse.sparsity, sparsity_plan=sparse.sparsity_plan)
        for s in subjects
    }
    return [one for subject in subjects for one in (subject, on_top[subject])]
