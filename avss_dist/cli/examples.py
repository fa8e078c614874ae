"""What commands are used for: the examples at the end of their help."""

from __future__ import annotations

EXAMPLES = {
    "score": (
        "avss score org/name --corpus your.jsonl:text",
        "avss score model-a model-b --corpus hf:wikitext:wikitext-2-raw-v1 --replicas 4 -w s3://bucket/warehouse",
    ),
    "ablate": (
        "avss ablate org/name --corpus your.txt",
        "avss ablate org/name --corpus your.txt --no-leave-one-out --damage",
    ),
    "evaluate": ("avss evaluate org/name plan.yaml --task perplexity:heldout.txt --task hellaswag --limit 200",),
    "shrink": (
        "avss shrink org/name --corpus your.txt --share 0.25 -o smaller",
        "avss shrink org/name --corpus your.txt --keep 0.9 -o smaller",
    ),
    "run": ("avss run jobs/paper_claim.yaml --dry-run", "avss run jobs/paper_claim.yaml"),
    "estimate": ("avss estimate org/name --corpus your.txt --max-memory cpu=16GB",),
    "ls": ("avss ls", "avss ls evaluations -w s3://bucket/warehouse"),
    "show": (
        "avss show --run smollm2 --site update --threshold 0.1rms",
        "avss show --run 'smollm2-*' --format latex -o scores.tex",
    ),
    "quantiles": ("avss quantiles --q 0.99 --sparsity 0.5",),
    "compare": ("avss compare --by family", "avss compare --run 'smollm2-*' --by threshold --score avss"),
    "contrast": ("avss contrast -w paired --format csv",),
    "findings": ("avss findings --all",),
    "scorecard": ("avss scorecard --run smollm2",),
    "plot": ("avss plot --run smollm2 -o layers.png",),
    "report": ("avss report -o report.html",),
    "publish": ("avss publish published",),
    "query": (
        "avss query --schema",
        "avss query 'SELECT model, layer, rank FROM scores_at(0.01) WHERE rank < 4'",
        "avss query @drift --format csv -o drift.csv",
    ),
    "plan": (
        "avss plan --by damage --share 0.25 -o plan.yaml",
        "avss plan --search greedy --corpus your.txt --count 4 -o plan.yaml",
        "avss plan --memory 12GB --by damage -o plan.yaml",
        "avss plan --sparsify 0.5 -o sparse.yaml",
    ),
    "prune": ("avss prune org/name plan.yaml --repair-corpus your.txt -o pruned",),
    "sample": ("avss sample org/name --count 256 -o own.jsonl",),
    "doctor": ("avss doctor --json",),
    "jobs submit": ("avss jobs submit JOB.yaml --address http://HEAD:8265 --follow",),
    "jobs list": ("avss jobs list --address http://HEAD:8265 --json",),
    "jobs logs": ("avss jobs logs JOB_ID --address http://HEAD:8265 --follow",),
    "jobs stop": ("avss jobs stop JOB_ID --address http://HEAD:8265",),
}
"""By command; every option in them exists, which a test sees to."""


def epilog(command: str) -> str:
    """The examples of a command, a paragraph each: so none is wrapped into the next."""
    return "\n\n".join(("Examples:", *(f"  {line}" for line in EXAMPLES[command])))
