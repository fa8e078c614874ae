"""A trial of shrinking: the parts of its texts, and choice, repair and evaluation of plans on held-out text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from avss_dist.analysis.verdict import primary_metric
from avss_dist.core.errors import CorpusError
from avss_dist.core.intervention import NO_INTERVENTION, Intervention, count_removed
from avss_dist.core.settings import Settings
from avss_dist.core.text import RedactedURI
from avss_dist.core.values import NewObject
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.corpus.sources import open_source
from avss_dist.evaluation.own_text import OwnTextWriter, require_writable, rows_of_own_text, writing_obstacle
from avss_dist.evaluation.placed import PlacedModel, PlannedTask
from avss_dist.evaluation.planned_tasks import earlier_texts, plan_task, plan_text, refuse_overlaps
from avss_dist.evaluation.repairs import Patches, copies_of, fit_of, fit_repairs, plan_fits, repaired_removal
from avss_dist.evaluation.session import EvaluationSession, results_under
from avss_dist.models.checkpoint.layer_kinds import rules_of
from avss_dist.models.checkpoint.loading import text_config
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.planning.layers import LayerRanking
from avss_dist.planning.patterns import pattern_of
from avss_dist.plans.choice import Choice, PlanError, require_pattern_size
from avss_dist.plans.criteria import PUBLISHED, Criterion
from avss_dist.plans.plan import Plan
from avss_dist.pruning.repair.costs import tokens_needed
from avss_dist.pruning.repair.registry import NO_REPAIR, names_own_text
from avss_dist.pruning.repair.splits import HELD_BACK, SINK_TOKENS, count_fitted, split_texts
from avss_dist.requests import AblateRequest, ShrinkRequest
from avss_dist.runs.scoring import score
from avss_dist.stats.catalog import GREEDY, LOWEST_SHARE, SCORES
from avss_dist.stats.rankings import count_lowest
from avss_dist.studies.ablate import ablate
from avss_dist.studies.search import RepairedSearch
from avss_dist.studies.shrunk import WHOLE_RESULT, CandidateResult, TaskRetention
from avss_dist.tasks.results import Result
from avss_dist.warehouse.names import PERPLEXITY
from avss_dist.warehouse.reader import Warehouse

ROWS_OF_TEXT = 256
"""Number of rows that are read of each text by default."""
HELD_OUT = 8
"""One of this many rows is scored on, and one is evaluated on."""
WATCHED_PART = 8
"""One of this many rows is watched in a distillation."""
WATCHED = 16
"""Maximum number of rows to watch a distillation on."""
SCORED_SITES = ("block",)
MOST_SCORED = 16
"""Maximum number of rows to score on. More hardly improve the ranks, and the damage takes 8 passes over them."""


@dataclass(frozen=True)
class TextSplit:
    """Split of the rows of each text: rows to score, to evaluate, to watch distillation and to repair on, in order.

    Attributes:
        scored, evaluated: number of rows of the first two parts.
        rows: maximum number of rows of all parts.
        watched: number of rows on which the best checkpoint of a distillation is chosen; 0 without distillation.
    """

    scored: int
    evaluated: int
    rows: int
    watched: int = 0

    @property
    def measured(self) -> int:
        """Number of rows to score on and to evaluate on."""
        return self.scored + self.evaluated

    @property
    def held_out(self) -> int:
        """Number of rows before those to repair on."""
        return self.measured + self.watched


def split_rows(
    checkpoint: Checkpoint, texts: Sequence[str], settings: Settings, *, distilled: bool = False
) -> TextSplit:
    """Return the split of texts. The shortest text determines how many rows are held out.

    Args:
        distilled: hold out rows to watch a distillation on.

    Raises:
        CorpusError: a text cannot be read, is paired, or has too few rows.
    """
    rows = settings.max_sequences or ROWS_OF_TEXT
    num_rows: dict[str, int] = {}
    for text in texts:
        plan = plan_text(checkpoint, text, replace(settings, max_sequences=rows))
        if plan.shards[0].pairing:
            raise CorpusError(
                f"{text} is paired text, whose rows belong together: it has no part to repair on.",
                "Name its answers as plain text, such as FILE.jsonl:FIELD.",
            )
        num_rows[text] = plan.num_sequences
    shortest = min(num_rows, key=lambda text: num_rows[text])
    available = num_rows[shortest]
    if available < HELD_OUT:
        raise CorpusError(
            f"{shortest} has {available} rows; a part to score on, one to evaluate on and one to repair on take "
            f"{HELD_OUT} at least.",
            "Name a longer text, lower `sequence_length`, or raise `max_sequences`.",
        )
    part = available // HELD_OUT
    watched = 0
    if distilled:
        watched = min(available // WATCHED_PART, WATCHED)
    return TextSplit(scored=min(part, MOST_SCORED), evaluated=part, rows=rows, watched=watched)


def require_pattern(checkpoint: Checkpoint, request: ShrinkRequest) -> None:
    """Refuse a number of layers without which no set of the others keeps the pattern, before anything is measured.

    Raises:
        PlanError: see `require_pattern_size`; or no number of layers can be dropped.
    """
    rules = rules_of(text_config(checkpoint))
    if not rules:
        return
    num_layers = len(rules[0].whole)
    candidates = range(request.first, num_layers - request.last)
    pattern = pattern_of(rules, num_layers)
    if request.keep:
        if not pattern.sizes(candidates):
            require_pattern_size(pattern, 1, candidates)
        return
    require_pattern_size(pattern, count_lowest(num_layers, request.share or LOWEST_SHARE), candidates)


def with_writable_texts(request: ShrinkRequest, model: PlacedModel) -> tuple[ShrinkRequest, list[str]]:
    """Return the request for a placed model, and a remark if its repair is fitted on the given text alone.

    By default, the model writes as much text itself, where it is whole in one process.

    Raises:
        ConfigError: text that the model writes is named, and it cannot write where it is placed.
    """
    if request.repair == NO_REPAIR:
        return request, []
    if request.repair_corpora:
        require_writable(model, request.repair_corpora)
        return request, []
    obstacle = writing_obstacle(model)
    if obstacle is None:
        return request, []
    return on_text_alone(request, obstacle)


def on_text_alone(request: ShrinkRequest, reason: str) -> tuple[ShrinkRequest, list[str]]:
    """Return the request with the repair fitted on the given text alone, and a remark that says so."""
    remark = (
        f"The repair is fitted on {RedactedURI(request.corpus)} alone, without text that the model writes: {reason}."
    )
    return replace(request, repair_corpora=(request.corpus,)), [remark]


def read_repair_texts(checkpoint: Checkpoint, request: ShrinkRequest, split: TextSplit) -> list[CorpusPlan]:
    """Return the rows of the given texts that the repair is fitted on.

    Raises:
        CorpusError: a text cannot be read, or has no such row.
    """
    reading = replace(request.settings, max_sequences=split.rows - split.held_out, skip_sequences=split.held_out)
    return [plan_text(checkpoint, text, reading) for text in request.repair_texts]


def rows_to_write(texts: Sequence[CorpusPlan], request: ShrinkRequest, split: TextSplit) -> int:
    """Return the number of rows of text that the model writes itself for the repair; 0 if none is to be fitted on.

    Args:
        texts: rows of the given texts that it is fitted on.
    """
    if request.repair == NO_REPAIR or not names_own_text(request.weighted_repair_texts):
        return 0
    return rows_of_own_text(texts, split.rows - split.held_out)


def require_tokens(checkpoint: Checkpoint, request: ShrinkRequest, split: TextSplit) -> None:
    """Refuse texts whose rows for the repair hold too few tokens to fit it to, with those that the model writes itself.

    Raises:
        CorpusError: there are too few tokens.
    """
    needed = tokens_needed(checkpoint, request.repair, request.settings)
    texts = read_repair_texts(checkpoint, request, split)
    tokens = 0
    if texts:
        parts = split_texts(texts, request.settings.batch_size)
        tokens += sum(count_fitted(parts, len(texts)))
    own_rows = rows_to_write(texts, request, split)
    fitted_rows = own_rows - math.ceil(own_rows / HELD_BACK)
    tokens += fitted_rows * (request.settings.sequence_length - SINK_TOKENS)
    if tokens < needed:
        raise CorpusError(
            f"The repair {request.repair} of this model needs at least {needed:,} tokens to fit to, not {tokens:,}.",
            "Raise `max_sequences`, give longer texts, or choose a `repair` of fewer unknowns (channel).",
        )


def rank_layers(request: ShrinkRequest, session: EvaluationSession, split: TextSplit) -> LayerRanking:
    """Measure the score by which layers are chosen, or from which a search begins, and return its values."""
    options = scoring_options(request, session, split)
    run = score(str(request.model), sites=SCORED_SITES, **options)
    measuring = ablation_of_score(request, options)
    if measuring is not None:
        ablate(measuring)
    opened = Warehouse(session.store.root.full)
    row = opened.run(run.run_id)
    assert row is not None
    criterion = Criterion(request.ranked_by)
    if request.ranked_by == "avss":
        criterion = Criterion(request.ranked_by, reading=PUBLISHED)
    return LayerRanking.of_run(opened, row, criterion)


def scoring_options(request: ShrinkRequest, session: EvaluationSession, split: TextSplit) -> NewObject:
    """Return the options of the commands that measure the score."""
    return {
        **request.options,
        "max_sequences": split.scored,
        "corpus": request.corpus,
        "warehouse": session.store.root.full,
        "on_event": session.on_event,
    }


def ablation_of_score(request: ShrinkRequest, options: NewObject) -> AblateRequest | None:
    """Return the request of the ablation that the score takes, or None if it is part of the scores of a run.

    Args:
        options: see `scoring_options`.
    """
    ranked_by = SCORES[request.ranked_by]
    if not ranked_by.task:
        return None
    measuring = options | dict(ranked_by.ablate)
    return AblateRequest(str(request.model), **measuring)


def protected_choice(
    request: ShrinkRequest, criterion: Criterion, *, share: float | None = None, count: int | None = None
) -> Choice:
    """Return a choice of a share or a number of layers by a criterion, with the protected layers of a request."""
    return Choice(
        by=criterion.by,
        reading=criterion.reading,
        share=share,
        count=count,
        first=request.first,
        last=request.last,
        keep_pattern=request.keep_pattern,
    )


@dataclass(frozen=True, kw_only=True)
class ShrinkTrial:
    """Choice, repair and evaluation of plans of one model, on held-out text.

    Attributes:
        ranking: values by which layers are chosen, or from which a search begins.
        tasks: tasks by name.
        fit: task of fitting a repair; None for no repair.
        search: search of the layers; None if the values decide alone.
    """

    session: EvaluationSession
    request: ShrinkRequest
    ranking: LayerRanking
    tasks: Mapping[str, PlannedTask]
    fit: PlannedTask | None
    search: RepairedSearch | None

    @classmethod
    def plan_tasks(
        cls,
        session: EvaluationSession,
        model: PlacedModel,
        request: ShrinkRequest,
        split: TextSplit,
        ranking: LayerRanking,
        example: Plan,
        own_text: OwnTextWriter,
    ) -> ShrinkTrial:
        """Return the trial of a request, for plans like the example. Overlapping texts are refused."""
        tasks = held_out_tasks(model, request, split)
        fit = None
        if request.repair != NO_REPAIR:
            fit = _plan_fit(session, model, request, split, example, own_text)
        if not request.allow_overlap:
            _refuse_overlaps(model, request, split, tasks, fit, example)
        search = None
        if request.by == GREEDY:
            search = RepairedSearch.plan_tasks(session, model, ranking, request, split.scored, fit, own_text)
        return cls(session=session, request=request, ranking=ranking, tasks=tasks, fit=fit, search=search)

    def choose(self, *, share: float | None = None, count: int | None = None) -> Plan:
        """Return the plan that drops a share or a number of the layers."""
        if self.search is not None:
            return self.search.plan(protected_choice(self.request, Criterion(GREEDY), share=share, count=count))
        return self.ranking.plan(protected_choice(self.request, self.ranking.criterion, share=share, count=count))

    def counts(self, num_layers: int) -> list[int]:
        """Return the numbers of layers that can be dropped, ascending."""
        choice = protected_choice(self.request, self.ranking.criterion)
        candidates = choice.unprotected(num_layers)
        pattern = self.ranking.pattern(choice)
        if pattern is not None:
            return pattern.sizes(candidates)
        maximum = min(num_layers - 1, len(candidates))
        return list(range(1, maximum + 1))

    def keep_most(self, counts: Sequence[int], keep: float) -> tuple[CandidateResult, list[CandidateResult]]:
        """Find the plan that drops the most layers and retains at least ``keep``, by bisection.

        Args:
            counts: numbers of layers that can be dropped, ascending.

        Returns:
            The result of the plan, and all results by the number of dropped layers.

        Raises:
            PlanError: the plan that drops the fewest layers retains less.
        """
        results: dict[int, CandidateResult] = {}
        enough = -1  # place, among the numbers, of the largest one that is known to retain enough
        too_many = len(counts)
        while too_many - enough > 1:
            middle = (enough + too_many) // 2
            result = self.evaluate(self.choose(count=counts[middle]))
            results[middle] = result
            if result.kept >= keep:
                enough = middle
            else:
                too_many = middle
        curve = [results[place] for place in sorted(results)]
        if enough < 0:
            fewest = curve[0]
            if len(fewest.plan.drop) == 1:
                without = f"Without layer {fewest.plan.drop[0]}, the first to go,"
            else:
                without = f"Without the {count_removed(fewest.plan.drop)} that can go first,"
            raise PlanError(
                f"{without} {fewest.kept:z.1%} is kept, under {keep:.1%}.",
                "Ask for less with `keep`, choose by another score, or repair on more text.",
            )
        return results[enough], curve

    def evaluate(self, plan: Plan) -> CandidateResult:
        """Return the result of a plan: fit its repair, and measure it beside the whole model.

        Stored cells are reused.

        Raises:
            AvssError: a mistake, or a fit or an evaluation that failed. Measured cells remain in the warehouse.
        """
        patches: Patches = {}
        if self.fit is not None:
            patches = fit_repairs(self.session, [(self.fit, [plan.drop])])
        repaired = repaired_removal(plan.drop, self.fit, patches)
        variants = {WHOLE_RESULT: NO_INTERVENTION, "pruned": plan.intervention}
        if repaired.patch is not None:
            variants["repaired"] = repaired
        results = self.session.measure({task: variants.values() for task in self.tasks.values()})
        retained = []
        for name, task in self.tasks.items():
            primary = primary_results(results[task], variants)
            retained.append(TaskRetention(task=name, results=primary, skipped=task.settings.skip_sequences))
        return CandidateResult(plan=plan, patch=repaired.patch, tasks=retained)


def primary_results(results: Sequence[Result], variants: Mapping[str, Intervention]) -> dict[str, Result]:
    """Return the results of a task in its primary metric, by the name of the intervention."""
    of_model = [{"metric": result.metric} for result in results if result.layer is None]
    metric = primary_metric(of_model)
    primary = {}
    for name, intervention in variants.items():
        for result in results_under(results, intervention.key):
            if result.metric == metric:
                primary[name] = result
    return primary


def held_out_tasks(model: PlacedModel, request: ShrinkRequest, split: TextSplit) -> dict[str, PlannedTask]:
    """Return the tasks by name, each once: by default, the perplexity on every text.

    A task on one of the texts that are divided, under whatever name, skips the rows of the scores. No row of another
    text is skipped.
    """
    divided = {open_source(text).fingerprint() for text in request.texts}
    requested = request.tasks or [f"{PERPLEXITY}{text.full}" for text in request.texts]
    tasks = {}
    for name in dict.fromkeys(RedactedURI(task) for task in requested):
        skipped = 0
        if name.startswith(PERPLEXITY):
            source = open_source(name.full.removeprefix(PERPLEXITY))
            if source.fingerprint() in divided:
                skipped = split.scored
        evaluated = model.reading(max_sequences=split.evaluated, skip_sequences=skipped)
        tasks[str(name)] = plan_task(evaluated, name, limit=request.limit)
    return tasks


def _plan_fit(
    session: EvaluationSession,
    model: PlacedModel,
    request: ShrinkRequest,
    split: TextSplit,
    example: Plan,
    own_text: OwnTextWriter,
) -> PlannedTask:
    """Return the task of fitting the repair of a request, for plans like the example."""
    fits = plan_fits(
        model,
        example.layers,
        [request.repair],
        request.weighted_repair_texts,
        copies_of(model.placement, model.settings, session),
        own_text,
        max_sequences=split.rows - split.held_out,
        skip_sequences=split.held_out,
    )
    return fits[request.repair]


def _refuse_overlaps(
    model: PlacedModel,
    request: ShrinkRequest,
    split: TextSplit,
    tasks: Mapping[str, PlannedTask],
    fit: PlannedTask | None,
    example: Plan,
) -> None:
    """Refuse tasks on text that the layers are chosen on, or that the smaller model is fitted or distilled on.

    Raises:
        ConfigError: see `refuse_overlap`.
    """
    texts: Sequence[CorpusPlan] = ()
    if request.distill_tokens is not None:
        skipped = split.measured
        use = "the smaller model is distilled on"
        reading = model.reading(max_sequences=split.rows - skipped, skip_sequences=skipped).settings
        texts = [plan_text(model.checkpoint, text, reading) for text in request.repair_texts]
    else:
        skipped = split.held_out
        use = "the repair is fitted on"
        if fit is not None:
            texts = fit_of(fit).texts
    chosen_on = earlier_texts(example.seen, model.checkpoint, [request.corpus], skip_option=None)
    refuse_overlaps(
        [planned.task for planned in tasks.values()],
        texts,
        model,
        chosen_on,
        skipped=skipped,
        use=use,
        skip_option=None,
    )
