"""Commands: summary, module, and examples of the help."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command, before it is imported.

    Args:
        panel: heading in the help.
        module: module of this package that has a function of its name, whose spaces are underscores there.
        request: ``module:class`` of the values of the command.
        summary: first sentence of its help.
        formats: formats of what it prints, the default first.
        more: what its help says after the first sentence.
        examples: examples of its help. A test checks that every option in them exists.
    """

    panel: str
    module: str
    request: str
    summary: str
    formats: tuple[str, ...] = ()
    more: str = ""
    examples: tuple[str, ...] = ()


MEASURE, READ, CHANGE, ELSEWHERE = "Measure", "Read", "Change a model", "Run elsewhere"
TABLES, TEXT = ("table", "csv", "json"), ("text", "json")
QUERIES = (*TABLES, "markdown", "parquet")
COMMANDS = {
    "score": Command(
        MEASURE,
        "measure",
        "requests:ScoreAllRequest",
        "Score every layer of one or more models on a corpus, and keep the result as Parquet.",
        TEXT,
        examples=(
            "avss score org/name --corpus your.jsonl:text",
            "avss score model-a model-b --corpus hf:wikitext:wikitext-2-raw-v1 --replicas 4 -w s3://bucket/warehouse",
        ),
    ),
    "ablate": Command(
        MEASURE,
        "measure",
        "requests:AblateRequest",
        "Leave layers out, or round their weights, and measure the loss: the ground truth for scores.",
        TABLES,
        more="With --quantize, csv and json have a row for each number format, layer and linear map.",
        examples=(
            "avss ablate org/name --corpus your.txt",
            "avss ablate org/name --corpus your.txt --no-leave-one-out --damage",
        ),
    ),
    "evaluate": Command(
        MEASURE,
        "measure",
        "requests:EvaluateRequest",
        "Evaluate models and plans; a plan skips its layers in place and is compared with the whole model.",
        TABLES,
        examples=("avss evaluate org/name plan.yaml --tasks perplexity:heldout.txt --tasks hellaswag --limit 200",),
    ),
    "shrink": Command(
        MEASURE,
        "measure",
        "requests:ShrinkRequest",
        "Score a model, drop layers, repair and evaluate the rest, and write it; resumes if stopped.",
        TEXT,
        examples=(
            "avss shrink org/name --corpus your.txt --share 0.25 -o smaller",
            "avss shrink org/name --corpus your.txt --keep 0.9 -o smaller",
        ),
    ),
    "run": Command(
        MEASURE,
        "measure",
        "requests:RunCommandRequest",
        "Run a job file, its experiment included: finished runs are skipped, interrupted ones resumed.",
        TABLES,
        examples=("avss run jobs/paper_claim.yaml --dry-run", "avss run jobs/paper_claim.yaml"),
    ),
    "estimate": Command(
        MEASURE,
        "measure",
        "requests:EstimateRequest",
        "Estimate the memory of a run with every partition, before loading any weights.",
        ("table", "json"),
        examples=("avss estimate org/name --max-memory cpu=16GB", "avss estimate org/name --ranks 8"),
    ),
    "ls": Command(
        READ,
        "read",
        "read_requests:ListRequest",
        "List runs (with stored shards of unfinished ones), evaluated sets of layers, or evaluations, newest first.",
        TABLES,
        examples=("avss ls", "avss ls evaluations -w s3://bucket/warehouse"),
    ),
    "show": Command(
        READ,
        "read",
        "read_requests:ShowRequest",
        "Show scores by layer, at any threshold, or draw them; the lowest 25% of layers are marked.",
        TABLES,
        examples=(
            "avss show --run smollm2 --site update --threshold 0.1rms",
            "avss show --run 'smollm2-*' --format csv -o scores.csv",
            "avss show -o layers.png",
        ),
    ),
    "compare": Command(
        READ,
        "read",
        "read_requests:CompareRequest",
        "Compare layer rankings between runs: how far they agree, or how they move along training, size or row length.",
        TABLES,
        examples=("avss compare --by family", "avss compare --along step -o ranks.png"),
    ),
    "contrast": Command(
        READ,
        "read",
        "read_requests:ContrastCommandRequest",
        "Contrast hallucinated with truthful answers, layer by layer, with controls; for a run on paired text.",
        TABLES,
        examples=("avss contrast -w paired --format csv",),
    ),
    "findings": Command(
        READ,
        "read",
        "read_requests:FindingsRequest",
        "List findings that speak against scores: they track depth, noise, rounding, single units, and so on.",
        TABLES,
        examples=("avss findings --every", "avss findings --run smollm2 --truth"),
    ),
    "report": Command(
        READ,
        "read",
        "read_requests:ReportRequest",
        "Write a self-contained web page: findings, score card, charts across runs and by depth, tables.",
        (),
        examples=("avss report -o report.html",),
    ),
    "publish": Command(
        READ,
        "read",
        "read_requests:PublishRequest",
        "Write the finished runs for others: the page, a Parquet file for each table, and a dataset card.",
        (),
        examples=("avss publish published",),
    ),
    "compact": Command(
        READ,
        "read",
        "read_requests:WarehouseRequest",
        "Copy many finished runs into few large files, so that every reader opens them in a moment.",
        (),
        examples=("avss compact -w s3://bucket/warehouse",),
    ),
    "rm": Command(
        READ,
        "read",
        "read_requests:RemoveCommandRequest",
        "Remove runs, and evaluations of checkpoints that have no other run; it shows what goes, and asks.",
        TABLES,
        examples=("avss rm smollm2-1f1353f006 --dry-run", "avss rm --unused -w s3://bucket/warehouse"),
    ),
    "query": Command(
        READ,
        "read",
        "read_requests:QueryCommandRequest",
        "Query a warehouse with SQL (DuckDB). It only reads, and only the warehouse.",
        QUERIES,
        examples=(
            "avss query --schema",
            "avss query 'SELECT model, layer, rank FROM scores_at(0.01) WHERE rank < 4'",
            "avss query @drift --format csv -o drift.csv",
        ),
    ),
    "plan": Command(
        CHANGE,
        "change",
        "requests:PlanRequest",
        "Choose the layers or routed experts to drop, and write a plan with the reasons for and against.",
        (),
        examples=(
            "avss plan --by damage --share 0.25 -o plan.yaml",
            "avss plan --by greedy --corpus your.txt --count 4 -o plan.yaml",
            "avss plan --memory 12GB --by damage -o plan.yaml",
        ),
    ),
    "sparsify": Command(
        CHANGE,
        "change",
        "requests:SparsifyRequest",
        "Choose the activations that become zero, and write a sparsity plan with the reason.",
        (),
        more="The run must have measured the inputs of linear maps: avss score --sites inputs.",
        examples=("avss sparsify 0.5 -o sparse.yaml", "avss sparsify 0.5 --method loss -o sparse.yaml"),
    ),
    "quantize": Command(
        CHANGE,
        "change",
        "requests:PrecisionRequest",
        "Choose the number format of each linear map, and write a precision plan with the reason.",
        (),
        more="avss ablate --quantize FORMAT... must have predicted the losses.",
        examples=("avss quantize --bits 4.5 -o bits.yaml", "avss quantize --memory 2.5GB --by uniform -o bits.yaml"),
    ),
    "prune": Command(
        CHANGE,
        "change",
        "requests:PruneRequest",
        "Write a checkpoint without the layers or experts of a plan, repaired on request; needs little memory.",
        TEXT,
        examples=("avss prune org/name plan.yaml --repair-corpora your.txt -o pruned",),
    ),
    "distill": Command(
        CHANGE,
        "change",
        "requests:DistillRequest",
        "Train a smaller model on the predictions of the whole one, and write it; resumes if stopped.",
        TEXT,
        examples=(
            "avss distill smaller --teacher org/name --corpora your.txt --tokens 1e6 -o distilled",
            "avss distill smaller --teacher org/name --corpora your.txt=3 --watch other.txt --train lora -o distilled",
        ),
    ),
    "doctor": Command(
        ELSEWHERE,
        "jobs",
        "core.request:Request",
        "Check what works on this machine: devices, Ray, DeepSpeed, versions.",
        TEXT,
        examples=("avss doctor --format json",),
    ),
    "jobs submit": Command(
        ELSEWHERE,
        "jobs",
        "requests:SubmitRequest",
        "Submit a job file to a Ray cluster, which runs it with avss run; it needs avss_dist and the models.",
        TEXT,
        examples=("avss jobs submit JOB.yaml --address http://HEAD:8265 --follow",),
    ),
    "jobs list": Command(
        ELSEWHERE,
        "jobs",
        "requests:ListJobsRequest",
        "List submitted jobs and their status.",
        TABLES,
        examples=("avss jobs list --address http://HEAD:8265 --format json",),
    ),
    "jobs logs": Command(
        ELSEWHERE,
        "jobs",
        "requests:LogsRequest",
        "Print the log of a submitted job.",
        (),
        examples=("avss jobs logs JOB_ID --address http://HEAD:8265 --follow",),
    ),
    "jobs stop": Command(
        ELSEWHERE,
        "jobs",
        "requests:JobIdRequest",
        "Stop a submitted job; its measurements are kept, and submitting it again resumes it.",
        TEXT,
        examples=("avss jobs stop JOB_ID --address http://HEAD:8265",),
    ),
}
JOBS = "Jobs on a Ray cluster."
_OFFLOAD_FOLDERS = tuple(f"{command} --offload-folder" for command in ("score", "ablate", "evaluate", "shrink"))
_SECONDS = {
    f"jobs {command} --{name}-seconds": f"set the variable AVSS_{name.upper()}_SECONDS"
    for command in ("submit", "list", "logs", "stop")
    for name in ("connect", "answer")
}
REMOVED: dict[str, str] = {
    "--site": "write --sites.",
    "--threshold": "write --thresholds.",
    "--task": "write --tasks.",
    "--node-label": "write --node-labels.",
    "--layers-path": "write --layers.",
    "--attn-implementation": "write --attention.",
    "--repair-corpus": "write --repair-corpora.",
    "distill --corpus": "write --corpora.",
    "--yes": "write --allow-many.",
    "findings --all": "write --every.",
    "--protect": "write --first 1 --last 1.",
    **dict.fromkeys(_OFFLOAD_FOLDERS, "set the variable TMPDIR where the model runs"),
    **_SECONDS,
    "score --label-field": "`avss score ORG/NAME --corpus FILE.jsonl:prompt+answer:LABEL`",
    "score --tracker": "leave it out, the warehouse has settings and scores.",
    "run --tracker": "leave it out, the warehouse has settings and scores.",
    "distill --tracker": "`--report-to wandb`",
    "ablate --lens": "`avss ablate ORG/NAME --corpus CORPUS --damage`",
    "ablate --spectra": "`avss ablate ORG/NAME --corpus CORPUS --damage`",
    "--json": "`--format json`",
    "plan --json": "the file that the command writes has all that it printed",
    "sparsify --json": "the file that the command writes has all that it printed",
    "quantize --json": "the file that the command writes has all that it printed",
    "compare --k": "`avss compare --share 0.1`",
    "publish --space": "`avss publish published`, and upload that folder",
    "plot": "`avss show -o layers.png`",
    "quantiles": "`avss show --quantiles`, or `avss show --sparsity 0.5`",
    "scorecard": "`avss findings --truth`",
    "estimate --corpus": "`avss estimate ORG/NAME` (memory does not depend on the text)",
    "estimate --hardware": "`avss estimate ORG/NAME --ranks 8` (the memory of each of 8 ranks)",
    "ablate --rounded-maps": "`avss ablate ORG/NAME --corpus CORPUS --quantize int4` predicts it for every map",
    "score --gradients": "`avss ablate ORG/NAME --corpus CORPUS --gradients`",
    "plan --format": "`avss prune ORG/NAME plan.yaml -o pruned` writes the checkpoint, which other tools read",
    "plan --search": "`avss plan --by greedy --corpus your.txt -o plan.yaml`",
    "plan --sublayers": "`avss ablate ORG/NAME --corpus CORPUS --sublayers`",
    "plan --budget": "`avss plan --by greedy --corpus your.txt -o plan.yaml` measures each set once",
    "plan --width": "`avss plan --by greedy --corpus your.txt -o plan.yaml`",
    "plan --mass": "`avss plan --count 4 -o plan.yaml`",
    "plan --parameters": "`avss plan --memory 12GB -o plan.yaml`",
    "plan --share-of-parameters": "`avss plan --memory 12GB -o plan.yaml`",
    "plan --contiguous": "`avss plan --by block_distance -o plan.yaml` drops a block of neighbours",
    "sparsify --format": "`avss sparsify 0.5 -o sparse.yaml` writes each threshold into its YAML",
    "sparsify --corrections": "`avss sparsify 0.5 --method loss -o sparse.yaml` keeps more",
    "sparsify --pattern": "`avss sparsify 0.5 --method wina -o sparse.yaml`",
    "plan --sparsify": "`avss sparsify 0.5 -o sparse.yaml`",
    "sample": "`avss prune ORG/NAME PLAN.yaml --repair-corpora self -o OUTPUT` fits a repair on text of the model.",
    "shrink --continuation-tokens": "leave it out, 48 tokens are shown.",
    "shrink --prompt": "leave it out, the starts of three held-out rows are continued.",
    "ablate --draws": "leave it out, two labels are drawn for each token.",
    "evaluate --apply-chat-template": "`avss evaluate ORG/NAME --tasks TASK --chat-template`",
    "evaluate --fewshot-as-multiturn": "leave it out, or ask lm-evaluation-harness itself.",
    "evaluate --system-instruction": "leave it out, or ask lm-evaluation-harness itself.",
    "prune --push": "leave it out, and type hf upload ORG/NAME OUTPUT.",
    "shrink --num-fewshot": "`avss evaluate OUTPUT --tasks TASK --num-fewshot 2`",
    "distill --picture": "leave it out, the record beside the weights has the curve.",
    "distill --executor": "leave it out, the teacher runs beside the student.",
    "distill --fresh": "leave it out, the teacher runs beside the student.",
    "distill --gpus-per-replica": "leave it out, the teacher runs beside the student.",
    "distill --max-memory": "leave it out, the teacher runs beside the student.",
    "distill --partition": "leave it out, the teacher runs beside the student.",
    "distill --replicas": "leave it out, the teacher runs beside the student.",
    "distill --warehouse": "leave it out, the teacher runs beside the student.",
    "distill --hidden-loss": "leave it out, the divergence is the loss.",
    "distill --patience": "leave it out, three evaluations without a lower divergence end a training.",
    "distill --teacher-top": "leave it out, the teacher runs beside the student.",
    "distill --text-loss": "leave it out, the divergence is the loss.",
}
"""Advice for commands and options of version 0.2 that were removed: the command line, or the reason to leave them out.

Keys are a command (``plot``), an option of a command (``plan --json``), or an option of every command (``--json``).
"""


def epilog(command: str) -> str:
    """Return the examples of a command, whose lines are not wrapped, and what holds for every command."""
    lines = "\n".join(f"  {line}" for line in COMMANDS[command].examples)
    common = "--help-all lists all options. Every command takes --quiet and --verbose."
    return f"\b\nExamples:\n{lines}\n{common}"
