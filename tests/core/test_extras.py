"""Hints to install what is missing name where this package was installed from."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from avss_dist.core.extras import PATH_MEANING, install_hint, package_hint

REVISION = {"vcs": "git", "commit_id": "0123abcd", "requested_revision": "main"}


@pytest.fixture
def activated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a prefix of Python whose pip is the first on the path."""
    scripts = tmp_path / "environment" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "pip").write_text("#!/bin/sh\n")
    (scripts / "pip").chmod(0o755)
    monkeypatch.setattr(sys, "prefix", str(scripts.parent))
    monkeypatch.setenv("PATH", str(scripts), prepend=":")
    return scripts.parent


def install(site: Path, monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any] | None) -> None:
    """Write the metadata of an installed package into a folder that comes first on the path of Python."""
    metadata = site / "avss_dist-9.9.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: avss_dist\nVersion: 9.9\n")
    if origin is not None:
        (metadata / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(str(site))


def test_the_folder_of_a_clone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activated: Path) -> None:
    clone = tmp_path / "my clone"
    clone.mkdir()
    install(tmp_path / "site", monkeypatch, {"url": clone.as_uri(), "dir_info": {}})
    assert install_hint("torch") == f"pip install '{clone}[run]'"


def test_an_editable_installation_stays_editable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activated: Path
) -> None:
    install(tmp_path / "site", monkeypatch, {"url": tmp_path.as_uri(), "dir_info": {"editable": True}})
    assert install_hint("gguf") == f"pip install -e '{tmp_path}[gguf]'"


def test_a_wheel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activated: Path) -> None:
    wheel = tmp_path / "avss_dist-9.9-py3-none-any.whl"
    wheel.touch()
    install(tmp_path / "site", monkeypatch, {"url": wheel.as_uri(), "archive_info": {}})
    assert install_hint("lm_eval") == f"pip install '{wheel}[eval]'"


def test_a_wheel_that_was_removed_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activated: Path
) -> None:
    wheel = tmp_path / "avss_dist-9.9-py3-none-any.whl"
    install(tmp_path / "site", monkeypatch, {"url": wheel.as_uri(), "archive_info": {}})
    assert install_hint("datasets") == f"pip install 'PATH[hf]', {PATH_MEANING} ({wheel} is no longer there)"


@pytest.mark.parametrize(
    ("origin", "requirement"),
    [
        ({"url": "https://host/a.whl", "archive_info": {}}, "avss_dist[run] @ https://host/a.whl"),
        ({"url": "https://host/a.git", "vcs_info": REVISION}, "avss_dist[run] @ git+https://host/a.git@main"),
    ],
)
def test_an_address_is_named(
    origin: dict[str, Any], requirement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activated: Path
) -> None:
    install(tmp_path / "site", monkeypatch, origin)
    assert install_hint("torch") == f"pip install '{requirement}'"


def test_without_a_record_the_clone_that_is_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activated: Path
) -> None:
    install(tmp_path / "site", monkeypatch, None)
    assert package_hint() == shlex.join(["pip", "install", str(Path(__file__).parents[2])])


def test_the_pip_of_an_environment_that_is_not_activated_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activated: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install_hint("pandas") == shlex.join([sys.executable, "-m", "pip", "install", "pandas"])


def test_other_packages_are_installed_by_name(activated: Path) -> None:
    assert install_hint("pandas") == "pip install pandas"
