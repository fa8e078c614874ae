"""Commands and options of version 0.2 that were removed, and what to write instead."""

from __future__ import annotations

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
