"""Private names of other packages that the package uses, each with how to tell that an installed version still has it.

Whoever uses another one adds it here; `tests/test_dependencies.py` compares this table with the code.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def _at(path: str) -> Callable[[], object]:
    """Return a check that gets ``module:attribute.attribute``."""
    module, _, attributes = path.partition(":")

    def get() -> object:
        value: Any = import_module(module)
        for name in attributes.split("."):
            value = getattr(value, name)
        return value

    return get


def _hooked() -> Any:
    """Return a module that has a hook of accelerate."""
    hooks = import_module("accelerate.hooks")
    return hooks.add_hook_to_module(import_module("torch.nn").Identity(), hooks.ModelHook())


PRIVATE_NAMES: dict[str, tuple[str, Callable[[], object]]] = {
    "_private": ("ray", _at("ray:_private")),
    "_worker_logs_enabled": ("ray", _at("ray._private.worker:_worker_logs_enabled")),
    "_private.state.actors": ("ray", _at("ray._private.state:actors")),
    "_private.state.available_resources_per_node": ("ray", _at("ray._private.state:available_resources_per_node")),
    "_private.state.state": ("ray", _at("ray._private.state:state.get_draining_nodes")),
    "_actor_id": ("ray", _at("ray.actor:ActorHandle._actor_id")),
    "_do_request": ("ray", _at("ray.job_submission:JobSubmissionClient._do_request")),
    "__compatible_ops__": ("deepspeed", _at("deepspeed.ops:__compatible_ops__")),
    "_hf_hook": ("accelerate", lambda: _hooked()._hf_hook),
    "_old_forward": ("accelerate", lambda: _hooked()._old_forward),
    "_reset_state": ("accelerate", _at("accelerate.state:AcceleratorState._reset_state")),
    "_model_mapping": ("transformers", _at("transformers:AutoModelForCausalLM._model_mapping")),
    "_attn_implementation": (
        "transformers",
        lambda: import_module("transformers").PreTrainedConfig()._attn_implementation,
    ),
    "_keep_in_fp32_modules": ("transformers", _at("transformers:PreTrainedModel._keep_in_fp32_modules")),
    "_dequantize_one": ("transformers", _at("transformers.integrations.finegrained_fp8:Fp8Dequantize._dequantize_one")),
    "_apply": ("torch", _at("torch.nn:Module._apply")),
    "_cdata": ("torch", _at("torch:UntypedStorage._cdata")),
    "_is_mkldnn_bf16_supported": ("torch", _at("torch:ops.mkldnn._is_mkldnn_bf16_supported")),
    "_KERNEL_MODULE_MAPPING": ("transformers", _at("transformers.integrations.hub_kernels:_KERNEL_MODULE_MAPPING")),
    "_parameters": ("torch", lambda: import_module("torch.nn").Module()._parameters),
    "_buffers": ("torch", lambda: import_module("torch.nn").Module()._buffers),
}
"""By the name as the code writes it: the package, and a check that raises where the name is gone."""
