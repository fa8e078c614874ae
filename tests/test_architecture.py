"""`tests/architecture.py` finds what it is there to find, in small packages made for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "architecture.py"
PYPROJECT = """
[tool.importlinter]
root_package = "made_up"

[[tool.importlinter.contracts]]
type = "layers"
layers = ["top", "left | right", "bottom"]
"""
SIX_LINES = "".join(f"value_{i} = {i} + 1\n" for i in range(6))

Check = Callable[[dict[str, str]], subprocess.CompletedProcess[str]]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """What the script says of a package of these modules, every package with an empty ``__init__``."""

    def run(modules: dict[str, str]) -> subprocess.CompletedProcess[str]:
        (tmp_path / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
        for name, text in modules.items():
            path = tmp_path / "made_up" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        for folder in {path.parent for path in tmp_path.rglob("*.py")} | {tmp_path / "made_up"}:
            (folder / "__init__.py").touch()
        command = [sys.executable, str(SCRIPT), str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


def test_a_good_package_is_drawn(check: Check) -> None:
    modules = {
        "top/a.py": "from made_up.left import b\nfrom made_up.right import c\nfrom made_up.left.b import x\n",
        "left/b.py": "from made_up.bottom.d import x\n",
        "right/c.py": "",
        "bottom/d.py": "x = 1\n",
    }
    done = check(modules)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["3", "top", "->", "left", "1,", "right", "1"]
    assert lines[-2:] == ["4 packages on 3 layers, 3 arrows, 3 imports between packages.", "No problem."]


@pytest.mark.parametrize(
    ("modules", "problem"),
    [
        (
            {"top/a.py": "from made_up.bottom import d\n", "bottom/d.py": "def f():\n    from made_up.top import a\n"},
            ("import circle: made_up: bottom -> top -> bottom", "import circle: made_up: top -> bottom -> top"),
        ),
        (
            {"left/a.py": "from made_up.left import b\n", "left/b.py": "from made_up.left import a\n"},
            ("import circle: made_up.left: a -> b -> a", "import circle: made_up.left: b -> a -> b"),
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
    ids=["circle between packages", "circle between modules", "complexity", "twice"],
)
def test_each_rule_can_be_broken(check: Check, modules: dict[str, str], problem: tuple[str, ...]) -> None:
    done = check(modules)
    assert done.returncode == 1
    assert set(problem) & set(done.stderr.splitlines()), done.stderr


def test_what_is_not_code_may_stand_twice(check: Check) -> None:
    text = (
        '"""Words."""\n\nimport os\nimport sys\nimport json\nimport math\nimport time\nimport glob\n# and\n# so\n# on\n'
    )
    done = check({"left/a.py": text, "right/b.py": text})
    assert done.returncode == 0, done.stderr


def test_the_limits_themselves_are_no_problem(check: Check) -> None:
    five = "".join(SIX_LINES.splitlines(keepends=True)[:5])
    branches = "def f(x):\n" + "".join(f"    if x == {i}:\n        print({i})\n" for i in range(14))
    done = check({"left/a.py": five, "right/b.py": five, "right/c.py": branches, "bottom/d.py": ""})
    assert done.returncode == 0, done.stderr
