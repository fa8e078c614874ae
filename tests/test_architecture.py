"""`tests/architecture.py` finds what it is there to find, in small packages made for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import architecture
import pytest

PYPROJECT = """
[tool.importlinter]
root_package = "made_up"

[[tool.importlinter.contracts]]
type = "layers"
layers = ["top", "left | right", "bottom"]
"""
TOP, BOTTOM = "made_up.top.a", "made_up.bottom.d"
SIX_LINES = "".join(f"value_{i} = {i} + 1\n" for i in range(6))

Check = Callable[[dict[str, str]], tuple[int, list[str]]]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """Return the exit code and the lines of the script for a package of these modules."""

    def run(modules: dict[str, str]) -> tuple[int, list[str]]:
        (tmp_path / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
        for name, text in modules.items():
            path = tmp_path / "made_up" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        for folder in {path.parent for path in tmp_path.rglob("*.py")} | {tmp_path / "made_up"}:
            (folder / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        code = architecture.main(tmp_path)
        return code, "".join(capsys.readouterr()).splitlines()

    return run


def test_a_good_package_is_drawn(check: Check) -> None:
    modules = {
        "top/a.py": "from made_up.left import b\nfrom made_up.right import c\nfrom made_up.left.b import x\n",
        "left/b.py": "from made_up.bottom.d import x\n",
        "right/c.py": "",
        "bottom/d.py": "x = 1\n",
    }
    code, lines = check(modules)
    assert code == 0
    assert lines[0].split() == ["3", "top", "->", "left", "1,", "right", "1"]
    assert lines[-2:] == ["4 packages on 3 layers, 3 arrows, 3 imports between packages.", "No problem."]


@pytest.mark.parametrize(
    ("modules", "problem"),
    [
        (
            {"top/a.py": "from made_up.bottom import d\n", "bottom/d.py": "def f():\n    from made_up.top import a\n"},
            (f"import circle: {TOP} -> {BOTTOM} -> {TOP}", f"import circle: {BOTTOM} -> {TOP} -> {BOTTOM}"),
        ),
        (
            {"left/a.py": "def f(x):\n" + "    if x:\n        print(x)\n" * 15},
            ("left/a.py:1: f has complexity 16",),
        ),
        (
            {"left/a.py": SIX_LINES, "right/b.py": f"def f():\n{SIX_LINES.replace('value', '    value')}"},
            ("left/a.py:1 and right/b.py:2: the same 6 lines, of which the first is 'value_0 = 0 + 1'",),
        ),
    ],
    ids=["circle", "complexity", "twice"],
)
def test_each_rule_can_be_broken(check: Check, modules: dict[str, str], problem: tuple[str, ...]) -> None:
    code, lines = check(modules)
    assert code == 1
    assert set(problem) & set(lines), lines


def test_the_limits_themselves_and_what_is_not_code_are_no_problem(check: Check) -> None:
    text = '"""Words."""\n\n' + "".join(f"import {name}\n" for name in ("os", "sys", "json", "math", "time", "glob"))
    five = "".join(SIX_LINES.splitlines(keepends=True)[:5])
    branches = "def f(x):\n" + "".join(f"    if x == {i}:\n        print({i})\n" for i in range(14))
    modules = {"left/a.py": five, "right/b.py": five, "right/c.py": branches, "bottom/d.py": ""}
    code, lines = check(
        modules | {"left/e.py": f"{text}# and\n# so\n# on\n", "right/e.py": f"{text}# and\n# so\n# on\n"}
    )
    assert code == 0, lines
