"""Paired text of tests."""

from __future__ import annotations

from pathlib import Path

from support.json_files import write_json_lines


def write_pairs(folder: Path, prompts: int) -> str:
    """A corpus of so many prompts, each with a good and a bad answer, of which some are longer than others."""
    rows = []
    for i in range(prompts):
        for kind, word in (("good", "itself"), ("bad", "something else")):
            answer = f"{i} times {word}" * (1 + i % 2)
            rows.append({"q": f"What is {i * i}?", "a": answer, "kind": kind})
    write_json_lines(folder / "pairs.jsonl", rows)
    return f"{folder}/pairs.jsonl:q+a:kind"
