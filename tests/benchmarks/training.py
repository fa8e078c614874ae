"""Train a small language model from several seeds, and save it at powers of two, to follow its layers along training.

    python tests/benchmarks/training.py FOLDER [--text builtin:pydoc FILE ...] [--seeds 1 2 3] [--steps 2048]

The last eighth of each text is held out: one half of it is in FOLDER/heldout.txt, the other in FOLDER/test.txt. The
tokenizer, a byte-level BPE, is made of the text that is trained on. A seed decides the initial weights and which rows a
step reads. All else is the same: a Llama or a mixture of experts, AdamW whose learning rate rises over the first steps
and falls to a tenth along a cosine, rows at random places. The checkpoints are FOLDER/run-seed1/checkpoint-1,
checkpoint-2, checkpoint-4 and so on. FOLDER/run-seed1/losses.csv has the mean loss of the steps since the checkpoint
before, and that of test.txt.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from support.checkpoints import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from avss_dist.corpus.sources import documents

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
"""Tokens 0, 1 and 2, as in the configuration of `llama`. No text has them."""
HEAD_SIZE = 32
EXPERTS_PER_TOKEN = 2
HELD_OUT = 8  # one of so many parts of each text is held out
TEST_ROWS = 64  # rows on which checkpoints are evaluated, in equal steps through test.txt
WARMUP = 100  # steps in which the learning rate rises, at most a tenth of all
LOWEST_RATE = 0.1  # relative to the highest
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
LARGEST_GRADIENT = 1.0  # norm to which gradients are clipped


@dataclass(frozen=True, kw_only=True)
class SavedPoint:
    """A checkpoint that was saved.

    Attributes:
        seed: seed of the training.
        step: optimizer steps before it.
        tokens: tokens that these steps read.
        loss: mean loss of the steps since the checkpoint before, in nats.
        test_loss: loss on rows held out, in nats.
        seconds: processor time of the steps so far, in seconds.
    """

    seed: int
    step: int
    tokens: int
    loss: float
    test_loss: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class SplitText:
    """A text in three parts, cut at ends of lines.

    Attributes:
        train: part that is trained on.
        scores: part for scores.
        test: part for other measurements.
    """

    train: str
    scores: str
    test: str


def split_text(source: str) -> SplitText:
    """Return the parts of the text of a source."""
    text = "\n".join(str(document) for document in documents(source)) + "\n"
    first_cut = text.index("\n", len(text) * (HELD_OUT - 1) // HELD_OUT) + 1
    second_cut = text.index("\n", (first_cut + len(text)) // 2) + 1
    return SplitText(train=text[:first_cut], scores=text[first_cut:second_cut], test=text[second_cut:])


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of the pairs that are frequent in texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)


def tokens_of(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Return the tokens of a text, int64[tokens]."""
    return torch.tensor(tokenizer(text, verbose=False).input_ids)


def rows_of(tokens: Tensor, starts: Tensor, length: int) -> Tensor:
    """Return rows of neighbouring tokens, int64[rows, length].

    Args:
        starts: place of the first token of each row.
    """
    return tokens[starts[:, None] + torch.arange(length)]


def new_model(options: argparse.Namespace, seed: int, vocabulary: int) -> Any:
    """Return a model with random weights: a Llama, or a Qwen3-MoE whose layers take turns in pairs, dense ones last."""
    heads = options.width // HEAD_SIZE
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": options.width,
        "intermediate_size": 3 * options.width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": options.length,
        "tie_word_embeddings": True,
    }
    if not options.experts:
        return llama(seed, **sizes)
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        **sizes,
        head_dim=HEAD_SIZE,
        num_experts=options.experts,
        num_experts_per_tok=EXPERTS_PER_TOKEN,
        moe_intermediate_size=3 * options.width // EXPERTS_PER_TOKEN,
        mlp_only_layers=[layer for layer in range(options.layers) if layer % 4 >= 2],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Qwen3MoeForCausalLM(config)


def rate_at(step: int, steps: int) -> float:
    """Return the learning rate of a step, counted from 0, relative to the highest."""
    warmup = min(WARMUP, max(1, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return LOWEST_RATE + (1 - LOWEST_RATE) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def loss_on(model: Any, rows: Tensor) -> float:
    """Return the mean loss on rows, in nats."""
    return float(model(rows, labels=rows).loss)


def train(
    options: argparse.Namespace, seed: int, tokenizer: PreTrainedTokenizerFast, tokens: Tensor, test_rows: Tensor
) -> None:
    """Train a model, save its checkpoints, and print and write their losses.

    Args:
        tokens: tokens to train on, int64[tokens].
        test_rows: rows held out, int64[rows, length].
    """
    folder = options.folder / f"run-seed{seed}"
    folder.mkdir(parents=True)
    model = new_model(options, seed, len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, options.steps))
    random = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    seconds = 0.0
    with (folder / "losses.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [field.name for field in fields(SavedPoint)])
        table.writeheader()
        for step in range(1, options.steps + 1):
            start = time.process_time()
            starts = torch.randint(len(tokens) - options.length, (options.rows,), generator=random)
            batch = rows_of(tokens, starts, options.length)
            loss = model(batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            seconds += time.process_time() - start
            is_power_of_two = step.bit_count() == 1
            if not is_power_of_two:
                continue
            checkpoint = folder / f"checkpoint-{step}"
            model.save_pretrained(checkpoint)
            tokenizer.save_pretrained(checkpoint)
            point = SavedPoint(
                seed=seed,
                step=step,
                tokens=step * options.rows * options.length,
                loss=sum(losses) / len(losses),
                test_loss=loss_on(model, test_rows),
                seconds=seconds,
            )
            losses.clear()
            table.writerow(asdict(point))
            file.flush()
            print(describe(point), flush=True)


def describe(point: SavedPoint) -> str:
    """Return the losses of a checkpoint as a line."""
    return (
        f"seed {point.seed}, step {point.step:5}, {point.tokens:9,} tokens: loss {point.loss:.3f}, "
        f"held out {point.test_loss:.3f}, {point.seconds:.1f} s of a processor"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", nargs="+", default=["builtin:pydoc"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=0, help="experts of each second pair of layers; 0 for a Llama")
    parser.add_argument("--rows", type=int, default=4, help="rows that a step reads")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rate", type=float, default=2e-3, help="the highest learning rate")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    texts = [split_text(source) for source in options.text]
    test_text = "".join(text.test for text in texts)
    (options.folder / "heldout.txt").write_text("".join(text.scores for text in texts), encoding="utf-8")
    (options.folder / "test.txt").write_text(test_text, encoding="utf-8")
    tokenizer = make_tokenizer([text.train for text in texts], options.vocabulary)
    tokens = torch.cat([tokens_of(tokenizer, text.train) for text in texts])
    test_tokens = tokens_of(tokenizer, test_text)
    starts = torch.linspace(0, len(test_tokens) - options.length, TEST_ROWS).long()
    test_rows = rows_of(test_tokens, starts, options.length)
    print(f"{len(tokens):,} tokens to train on", flush=True)
    for seed in options.seeds:
        train(options, seed, tokenizer, tokens, test_rows)


if __name__ == "__main__":
    main()
