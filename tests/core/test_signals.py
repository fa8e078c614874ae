"""SIGTERM ends a command as Ctrl-C does: nothing half-written stays, and the exit code says what ended it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic_core import SchemaError
from support.command_line import avss

from avss_dist.__main__ import main
from avss_dist.core import process, validation
from avss_dist.core.process import preserve_sigterm_handler, raise_on_sigterm, stop_signal
from avss_dist.plans.plan import Plan


@pytest.fixture
def default_sigterm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(process, "_terminated", False)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def plan(tiny_llama: Path, tmp_path: Path) -> Path:
    plan = Plan(model=str(tiny_llama), revision=None, num_layers=3, layers="layers", drop=(1,), why={})
    plan.write(tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml"


@pytest.mark.usefixtures("default_sigterm")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_a_checkpoint_is_written_leaves_nothing(
    number: signal.Signals, code: int, plan: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is sent twice, as `timeout` does: while files are copied, and during the cleanup."""
    remove = shutil.rmtree

    def interrupted_copy(_checkpoint: Any, _names: Any, staged: Path) -> None:
        assert any(staged.iterdir())
        assert not (plan.parent / "out").exists()
        signal.raise_signal(number)

    def interrupted_remove(*args: Any, **options: Any) -> None:
        if number is signal.SIGTERM:
            signal.raise_signal(number)
        remove(*args, **options)

    monkeypatch.setattr("avss_dist.pruning.checkpoint._copy_files", interrupted_copy)
    monkeypatch.setattr("avss_dist.core.files.shutil.rmtree", interrupted_remove)
    raise_on_sigterm()
    done = avss("prune", tiny_llama, plan, "-o", plan.parent / "out")
    assert done.exit_code == code
    assert "Stopped." in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in plan.parent.iterdir()] == ["plan.yaml"]


class Interrupted(ModuleType):
    """A module during whose import this process gets a signal."""

    def __getattr__(self, _name: str) -> Any:
        signal.raise_signal(self.number)


@pytest.mark.usefixtures("default_sigterm")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_commands_are_imported_is_no_traceback(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Interrupted("avss_dist.cli")
    module.__dict__["number"] = number
    monkeypatch.setitem(sys.modules, "avss_dist.cli", module)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == code
    assert capsys.readouterr().err == "Stopped.\n"


def test_a_signal_while_checks_are_prepared_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """pydantic puts it into the text of an error of its own."""

    def interrupted(_: Any) -> None:
        raise SchemaError('Error building "dataclass-args" validator:\n  KeyboardInterrupt: ')

    monkeypatch.setattr(validation, "TypeAdapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        validation.adapter(list[Plan])


@pytest.mark.usefixtures("default_sigterm")
def test_sigterm_is_raised_once() -> None:
    raise_on_sigterm()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop_signal() == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGTERM)  # while the command cleans up


@pytest.mark.usefixtures("default_sigterm")
def test_a_child_that_was_forked_ends_as_usual() -> None:
    raise_on_sigterm()
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


@pytest.mark.usefixtures("default_sigterm")
def test_a_handler_that_is_there_stays() -> None:
    def mine(*_: object) -> None: ...

    signal.signal(signal.SIGTERM, mine)
    raise_on_sigterm()
    assert signal.getsignal(signal.SIGTERM) is mine


@pytest.mark.usefixtures("default_sigterm")
def test_a_library_does_not_take_the_handler_of_a_command() -> None:
    def theirs(*_: object) -> None: ...

    raise_on_sigterm()
    ours = signal.getsignal(signal.SIGTERM)
    with preserve_sigterm_handler():
        signal.signal(signal.SIGTERM, theirs)
    assert signal.getsignal(signal.SIGTERM) is ours
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with preserve_sigterm_handler():
        signal.signal(signal.SIGTERM, theirs)
    assert signal.getsignal(signal.SIGTERM) is theirs  # no command: the library's is better than none
