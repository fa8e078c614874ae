"""A full disk is a failed run, exit code 1, of every command that writes; nothing of what is there is harmed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from support.command_line import avss, files
from support.disks import SmallDisk
from support.warehouses import activations, stats_of, write_measured

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")

TEXT = ["--corpus", "text.txt", "--max-sequences", "4", "--sequence-length", "16", "--executor", "local"]
SETTINGS = {"max_sequences": 4, "sequence_length": 16}
EXPERIMENT = {"tasks": ["perplexity:text.txt"], "scores": ["block_influence"], "shares": [0.34], "skip_sequences": 4}
COMMANDS = [
    ["score", "MODEL", *TEXT, "-w", "disk/w"],
    ["ablate", "MODEL", *TEXT, "--warehouse", "disk/w"],
    ["evaluate", "MODEL", "--tasks", "perplexity:text.txt", *TEXT[2:], "--warehouse", "disk/w"],
    ["run", "job.yaml"],
    ["prune", "MODEL", "plan.yaml", "-o", "disk/pruned"],
    ["shrink", "MODEL", *TEXT[:2], *TEXT[4:], "--repair", "channel", "--warehouse", "disk/w", "-o", "disk/shrunk"],
    ["plan", "-w", "w", "--by", "avss", "-o", "disk/plan.yaml"],
    ["report", "-w", "w", "-o", "disk/page.html"],
    ["show", "-w", "w", "--format", "csv", "-o", "disk/table.csv"],
    ["show", "-w", "w", "-o", "disk/picture.svg"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_full_disk_is_a_failed_run(
    command: list[str], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = {"warehouse": "disk/w", "models": [str(tiny_llama)], "corpora": ["text.txt"], "settings": SETTINGS}
    job |= {"execution": {"executor": "local"}, "experiment": EXPERIMENT}
    Path("job.yaml").write_text(yaml.safe_dump(job))
    Path("plan.yaml").write_text(f"{{model: {tiny_llama}, num_layers: 3, layers: model.layers, drop: [1]}}")
    Path("text.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    write_measured(tmp_path / "w", "tiny-1", stats_of(activations(0)), 8)
    before = files(tmp_path)
    with SmallDisk(tmp_path / "disk", megabytes=1) as disk:
        disk.fill()
        done = avss(*(str(tiny_llama) if arg == "MODEL" else arg for arg in command))
        disk.free()
        assert files(tmp_path) == before  # no half of a file either
    output = done.stdout + done.stderr
    assert done.exit_code == 1, output
    assert "o space left" in output and "Traceback" not in output
    assert done.stderr.count("Error: ") <= 1
