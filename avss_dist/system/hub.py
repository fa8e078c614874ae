"""Uploads to the hub of Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avss_dist.errors import ConfigError, RunFailed, first_line


def require_access(name: str, kind: str) -> None:
    """Fail before any work where nothing can be uploaded; the hub is not queried.

    Args:
        name: ``ORG/NAME``.
        kind: ``model`` or ``dataset``.

    Raises:
        ConfigError: it is no name of the hub, or there is no token.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        named = name.count("/") == 1
    except HFValidationError:
        named = False
    if not named:
        raise ConfigError(f"'{name}' is no name of a {kind} on the hub.", "Write ORG/NAME.")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{name} is on the hub, and HF_HUB_OFFLINE is set.", "Unset it, or keep the result here.")
    if not get_token():
        raise ConfigError(
            f"To write {name} on the hub takes a token, and there is none.",
            "Log in with `hf auth login`, or set HF_TOKEN to a token that may write.",
        )


def client_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises where it is not answered as it should be, whichever library it asks by."""
    from huggingface_hub.errors import HfHubHTTPError

    bases: Any = HfHubHTTPError.__bases__  # of that library, and OSError
    return (HfHubHTTPError, *bases, OSError)


def upload(folder: Path, name: str, kind: str, *, message: str, replaced: Sequence[str], hint: str) -> str:
    """Upload a folder in one commit; a repository that is not there yet is made, and private.

    Args:
        name, kind: as of `require_access`.
        message: of the commit.
        replaced: patterns of files of the repository that go, where the folder has none by their names.
        hint: what to do where it fails.

    Returns:
        The address of the repository.

    Raises:
        RunFailed: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made = api.create_repo(name, repo_type=kind, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            repo_type=kind,
            commit_message=message,
            delete_patterns=list(replaced),
        )
    except client_errors() as error:
        raise RunFailed(f"{name} could not be uploaded to the hub: {first_line(error)}", hint) from error
    return str(made)
