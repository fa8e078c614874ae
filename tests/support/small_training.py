"""A small training that writes checkpoints and deletes old ones, as a program of its own.

python small_training.py {trainer|loop} MODEL OUTPUT KEPT STEPS SECONDS: SECONDS pass between two checkpoints. A copy of
each checkpoint goes into the folder KEPT, so that a test has what the training deletes.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

LIMIT = 2
"""Number of checkpoints that stay."""
LENGTH = 16


class Rows(torch.utils.data.Dataset[Any]):
    """Rows of random tokens."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.randint(3, 300, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": row, "labels": row}


class Keeping(TrainerCallback):
    """Copies a checkpoint when the Trainer has written it, and waits."""

    def __init__(self, kept: Path, seconds: float) -> None:
        self._kept = kept
        self._seconds = seconds

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        name = f"checkpoint-{state.global_step}"
        shutil.copytree(Path(args.output_dir) / name, self._kept / name)
        time.sleep(self._seconds)


def train_by_trainer(model: Any, tokenizer: Any, output: Path, kept: Path, steps: int, seconds: float) -> None:
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        save_steps=1,
        save_total_limit=LIMIT,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model, arguments, train_dataset=Rows(), processing_class=tokenizer, callbacks=[Keeping(kept, seconds)]
    )
    trainer.train()


def train_by_loop(model: Any, tokenizer: Any, output: Path, kept: Path, steps: int, seconds: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    rows = Rows()
    for step in range(1, steps + 1):
        row = rows[step]["input_ids"][None]
        model(input_ids=row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        folder = output / f"checkpoint-{step}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        shutil.copytree(folder, kept / folder.name)
        old = output / f"checkpoint-{step - LIMIT}"
        if old.exists():
            shutil.rmtree(old)
        time.sleep(seconds)


def main() -> None:
    kind, model_folder, output, kept, steps, seconds = sys.argv[1:]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    train = {"trainer": train_by_trainer, "loop": train_by_loop}[kind]
    train(model, tokenizer, Path(output), Path(kept), int(steps), float(seconds))


if __name__ == "__main__":
    main()
