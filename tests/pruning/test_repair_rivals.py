"""Repairs of the literature beside ours: what each computes, in place, on every partition that repairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import llama, one_thread
from support.families import lively, tiny_model

from avss_dist.corpus.shards import plan as read_text
from avss_dist.evaluation.engine import plan_evaluation
from avss_dist.evaluation.make_tasks import text_task
from avss_dist.evaluation.repairs import fit_repairs, plan_fits
from avss_dist.executors.local import LocalExecutor
from avss_dist.models.checkpoints import resolve
from avss_dist.models.layers import first_tensor
from avss_dist.models.loading import load_tokenizer, open_module
from avss_dist.partition.base import Placement
from avss_dist.pruning.checkpoint import prune
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.repair.normal_equations import NormalEquations, fit, fit_plainly, hadamard
from avss_dist.pruning.repair.outlet import RepairError
from avss_dist.pruning.repair.repair import Repair
from avss_dist.settings import RIVAL_PATCHES, Settings
from avss_dist.warehouse.store import Store

Save = Callable[[Any, Path], Path]
TEXT = "builtin:pydoc"
READ: dict[str, Any] = {"sequence_length": 32, "batch_size": 4, "dtype": "float32", "device": "cpu"}
SETTINGS = Settings(**READ, max_sequences=40)
HELD_OUT = Settings(**READ, max_sequences=8)


@pytest.fixture(autouse=True)
def same_bytes() -> Iterator[None]:
    with one_thread():
        yield


def rows_of(folder: Path, settings: Settings, skip: int = 0) -> torch.Tensor:
    text = read_text(TEXT, load_tokenizer(resolve(str(folder))), settings, skip_sequences=skip)
    return torch.from_numpy(np.concatenate([shard.input_ids for shard in text.shards])).long()


def text_of(folder: Path) -> Any:
    return text_task(resolve(str(folder)), TEXT, HELD_OUT, skip_sequences=40)


def evaluated(folder: Path, layers: str, by: str, drop: tuple[int, ...], store: Path, partition: str) -> Any:
    """The patch of a repair, what is said of its cuts, and the loss with it, per row, on later text."""
    checkpoint, placement = resolve(str(folder)), Placement(partition=partition)
    repair = Repair(by=by, corpora=(TEXT,), settings=SETTINGS)
    text = text_of(folder)
    with closing(LocalExecutor(SETTINGS)) as executor:
        (fitted,) = plan_fits(checkpoint, layers, [repair], placement).values()
        (patch,) = fit_repairs([(fitted, [drop])], Store(store), executor).values()
        cells = plan_evaluation(checkpoint, text, HELD_OUT, placement).cells([drop], patch)
        rows = [result.rows[0].samples for _, result in executor.run_cells(iter([cells]))]
    repaired = patch.repaired()
    return repaired.tensors, repaired.record.cuts, np.concatenate(rows)


def patch_of(by: str, pruned: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """By its formula, float64[units, units], from streams [tokens, units]."""
    if by == "prune_comp":
        return whole.norm(dim=-1).mean() / pruned.norm(dim=-1).mean() * torch.eye(pruned.shape[-1]).double()
    turn = hadamard(pruned.shape[-1])
    return turn @ torch.diag((whole @ turn).abs().mean(0) / (pruned @ turn).abs().mean(0)) @ turn.T


@pytest.mark.parametrize("by", RIVAL_PATCHES)
def test_the_stream_is_patched_behind_each_cut(by: str, tmp_path: Path, save_checkpoint: Save) -> None:
    """As plain transformers computes it with hooks; the second cut sees the first patch; streaming gives the same."""
    model = lively(llama(num_hidden_layers=6)).eval()
    folder = save_checkpoint(model, tmp_path / "whole")
    tensors, cuts, losses = evaluated(folder, "layers", by, (1, 4), tmp_path / "w", "single")
    for partition in ("streaming", "device_map"):
        others = evaluated(folder, "layers", by, (1, 4), tmp_path / partition, partition)
        assert all(torch.equal(value, tensors[key]) for key, value in others[0].items())
        assert others[1] == cuts and (others[2] == losses).all()

    layers, found = model.model.layers, {}

    def keep(_module: Any, _args: Any, output: torch.Tensor) -> None:
        found[_module] = output.double()

    def multiply(matrix: torch.Tensor) -> Callable[..., torch.Tensor]:
        return lambda _module, _args, output: (output.double() @ matrix).float()

    def skip(_module: Any, args: Any, _output: torch.Tensor) -> torch.Tensor:
        return args[0].clone()

    ids, after, hooks = rows_of(folder, SETTINGS), (0, 3), []
    fitted, held = ids[:36], ids[36:]  # a tenth is held back
    wanted = {}
    for rows in (fitted, held):
        handles = [layers[cut].register_forward_hook(keep) for cut in (1, 4)]
        with torch.no_grad():
            model(rows, use_cache=False)
        wanted[len(rows)] = [found[layers[cut]][:, 1:].flatten(0, 1) for cut in (1, 4)]
        for handle in handles:
            handle.remove()
    hooks += [layers[cut].register_forward_hook(skip) for cut in (1, 4)]
    for number, layer in enumerate(after):
        streams = {}
        for rows in (fitted, held):
            handle = layers[layer].register_forward_hook(keep)
            with torch.no_grad():
                model(rows, use_cache=False)
            handle.remove()
            streams[len(rows)] = found[layers[layer]][:, 1:].flatten(0, 1)
        matrix = patch_of(by, streams[36], wanted[36][number])
        value = tensors[layer, ""].double()
        torch.testing.assert_close(
            value if value.dim() else value * torch.eye(32).double(), matrix, rtol=1e-4, atol=1e-5
        )
        missing = [wanted[4][number] - one for one in (streams[4], streams[4] @ matrix)]
        errors = [float(one.norm() / wanted[4][number].norm()) for one in missing]
        assert [cuts[number].error_before, cuts[number].error_after] == pytest.approx(errors, rel=1e-3)
        hooks.append(layers[layer].register_forward_hook(multiply(matrix)))
    rows = rows_of(folder, HELD_OUT, 40)
    with torch.no_grad():
        logits = model(rows, use_cache=False).logits
    each = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    assert losses.tolist() == pytest.approx(each.reshape(len(rows), -1).sum(1).tolist(), rel=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "bloom"])
def test_any_family_can_be_patched(family: str, tmp_path: Path, save_checkpoint: Save) -> None:
    """Also one whose weights can hold no repair. Sizes are matched, so less need not be missing."""
    model = lively(tiny_model("causal", family))
    folder = save_checkpoint(model, tmp_path / "whole")
    layers = open_module(model).structure.layers[0].name.rpartition(".")[0]
    _, (cut,), losses = evaluated(folder, layers, "linear_patch", (1,), tmp_path / "w", "single")
    plain = plan_evaluation(resolve(str(folder)), text_of(folder), HELD_OUT, Placement()).cells([(1,)])
    with closing(LocalExecutor(SETTINGS)) as executor:
        unpatched = np.concatenate([result.rows[0].samples for _, result in executor.run_cells(iter([plain]))])
    assert cut.error_after != cut.error_before and np.isfinite(losses).all() and (losses != unpatched).all()


@pytest.mark.parametrize("by", RIVAL_PATCHES)
def test_no_checkpoint_holds_a_patch_of_the_stream(by: str, tiny_llama: Path, tmp_path: Path) -> None:
    plan = Plan(model="m", num_layers=3, layers="layers", drop=(1,))
    with pytest.raises(RepairError, match=f"The repair {by} changes the stream itself"):
        prune(str(tiny_llama), plan, tmp_path / "less", repair=Repair(by=by, corpora=(TEXT,), settings=SETTINGS))
    assert not (tmp_path / "less").exists()


def test_replace_me_is_the_transform_of_least_squares(tmp_path: Path, save_checkpoint: Save) -> None:
    """T of what the MLP gives, so that with the attention's stream it is nearest to the whole model's; by numpy."""
    model = lively(llama()).eval()
    folder, seen = save_checkpoint(model, tmp_path / "whole"), {}
    plan = Plan(model=str(folder), num_layers=3, layers="layers", drop=(1,))
    settings = Settings(**READ, max_sequences=200)
    done = prune(
        str(folder), plan, tmp_path / "less", repair=Repair(by="replace_me", corpora=(TEXT,), settings=settings)
    )
    modules = {"mlp": model.model.layers[0].mlp, "stream": model.model.layers[0], "whole": model.model.layers[1]}
    for name, module in modules.items():
        module.register_forward_hook(lambda _m, _a, output, name=name: seen.update({name: first_tensor(output)}))
    with torch.no_grad():
        model(rows_of(folder, settings)[:180], use_cache=False)
    mlp, stream, whole = (seen[name][:, 1:].double().flatten(0, 1).numpy() for name in modules)
    transform = np.linalg.lstsq(mlp, whole - (stream - mlp))[0]
    from safetensors.torch import load_file

    name = "model.layers.0.mlp.down_proj.weight"
    before, after = (load_file(tmp_path / f / "model.safetensors")[name].double().numpy() for f in ("whole", "less"))
    np.testing.assert_allclose(after, transform.T @ before, rtol=2e-3, atol=2e-4)
    assert done["repair"].cuts[0].ridges == (0.0,)


def test_without_a_ridge_noise_is_followed() -> None:
    """Where `fit` finds that nothing helps."""
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.normal(size=(24, 20))) for _ in range(2))
    unseen = NormalEquations.of(*(torch.from_numpy(rng.normal(size=(500, 20))) for _ in range(2)))
    plain, ridged = (one(NormalEquations.of(x, y), unseen, "full") for one in (fit_plainly, fit))
    assert plain.ridge == 0.0 and plain.after > plain.before >= ridged.after
