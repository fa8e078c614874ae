"""The stub file of the package: real signatures of the public functions, for type checkers and editors.

Functions take the fields of their requests as keywords. Requests accept more types than their checks return, and names
come from registries, so that no annotation in the source can say both. `support.reference` writes the file.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import avss_dist
from support.documentation import DOCS

STUB = DOCS.parent / "__init__.pyi"
HEAD = '''"""Signatures of the public functions, made of their requests by ``tests/support/reference.py``."""'''
NOT_PUBLIC = {
    "Contrast": "analysis.contrast",
    "JobFile": "runs.job_file",
    "PrecisionPlan": "plans.map_plans",
    "RankingComparison": "analysis.comparison",
    "RankingCurves": "analysis.curves",
    "SparsityPlan": "plans.map_plans",
}
"""Modules of classes that signatures name and the package does not export."""
LITERALS = (bool, int, float, str, type(None))
"""Types of defaults that are written out."""


def stub() -> str:
    """Return the stub file."""
    public = {name: getattr(avss_dist, name) for name in sorted(avss_dist.__all__) if name != "__version__"}
    functions = {name: value for name, value in public.items() if _takes_keywords(value)}
    definitions: list[str] = []
    for name, function in functions.items():
        definitions += _definition(name, function)
    others = {name: value for name, value in public.items() if name not in functions}
    imports = [_import(value.__module__, name, exported=True) for name, value in others.items()]
    named = {*re.findall(r"\w+", "\n".join(definitions))}
    for name, module in NOT_PUBLIC.items():
        if name in named:
            imports.append(_import(f"avss_dist.{module}", name))
    lines = [
        HEAD,
        "",
        "from collections.abc import Callable, Mapping, Sequence",
        "from pathlib import Path",
        "from typing import Any, Literal",
        "",
        *sorted(imports),
        "",
        "__version__: str",
        *definitions,
        "",
    ]
    return "\n".join(lines)


def _takes_keywords(value: Any) -> bool:
    """Whether a public name is a function of a request."""
    return inspect.isfunction(value) and inspect.unwrap(value) is not value


def _import(module: str, name: str, *, exported: bool = False) -> str:
    if exported:
        return f"from {module} import {name} as {name}"
    return f"from {module} import {name}"


def _definition(name: str, function: Any) -> Iterator[str]:
    """Yield the lines of the signature of a function, a parameter on each, and its docstring without the parameters."""
    signature = inspect.signature(function)
    summary = str(function.__doc__).partition("\n")[0]
    yield ""
    yield f"def {name}("
    keywords_begun = False
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keywords_begun:
            keywords_begun = True
            yield "    *,"
        yield f"    {parameter.name}: {parameter.annotation}{_default(parameter)},"
    yield f") -> {signature.return_annotation}:"
    yield f'    """{summary}"""'


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return ""
    return f" = {parameter.default!r}" if isinstance(parameter.default, LITERALS) else " = ..."
