"""Uploads to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avss_dist.core.errors import ConfigError, RunFailed, first_line


def require_access(name: str) -> None:
    """Raise ConfigError, before any work, if no model can be uploaded. The hub is not queried.

    Args:
        name: ``ORG/NAME``.

    Raises:
        ConfigError: the name is not one of the hub, the hub is offline, or there is no token.
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
        raise ConfigError(f"'{name}' is not the name of a model on the hub: expected ORG/NAME.", "Write ORG/NAME.")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f"{name} cannot be uploaded to the hub: HF_HUB_OFFLINE is set.", "Unset it, or leave the upload out."
        )
    if not get_token():
        raise ConfigError(
            f"{name} cannot be uploaded to the hub without a token.",
            "Log in with `hf auth login`, or set HF_TOKEN to a token that may write.",
        )


def client_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that the hub's client raises for a failed request, with any HTTP library."""
    from huggingface_hub.errors import HfHubHTTPError

    bases: Any = HfHubHTTPError.__bases__  # of that library, and OSError
    return (HfHubHTTPError, *bases, OSError)


def upload(folder: Path, name: str, *, message: str, replaced: Sequence[str], hint: str) -> str:
    """Upload a model in one commit. A repository that does not exist is created, and private.

    Args:
        name: as for `require_access`.
        message: message of the commit.
        replaced: patterns of files to delete from the repository unless the folder has them.
        hint: hint of the error if the upload fails.

    Returns:
        The address of the repository.

    Raises:
        RunFailed: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, delete_patterns=list(replaced))
    except client_errors() as error:
        raise RunFailed(f"{name} could not be uploaded to the hub: {first_line(error)}", hint) from error
    return str(url)
