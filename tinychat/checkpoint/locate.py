"""From what a user calls a model to the directory that holds it: the shipped model, a folder, or a hub id.

Nothing here looks into the files; what is downloaded can only be data (never pickles, never code).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from tinychat.checkpoint.quoting import quote
from tinychat.errors import CheckpointError

SHIPPED = "pebble"
GGUF = ".gguf"
_PACKAGE = Path(__file__).resolve().parent.parent
_SHIPPED_AT = (_PACKAGE / "models" / SHIPPED, _PACKAGE.parent / "models" / SHIPPED / "checkpoint")  # wheel, clone

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_HUB_ID = re.compile(rf"{_PART}/{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_PATH_LIKE = re.compile(r"[./~\\]|.*\\|[A-Za-z]:|.*/.*/|.*/$|[^/]*$", re.DOTALL)
_WANTED = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "LICENSE*")
_UNWANTED = ("*/*", "consolidated*.safetensors")  # folders hold other formats; consolidated: the weights once more


def locate(model: str | Path, *, revision: str | None = None, offline: bool = False) -> Path:
    """The directory of `model`: "pebble" (the model that ships with tinychat), an existing directory or GGUF file, or a
    hub id.

    A hub id is "owner/name"; its files are downloaded into huggingface_hub's cache with progress bars, at `revision`
    (branch, tag or commit) if given. `offline`, or HF_HUB_OFFLINE in the environment, takes what the cache has.
    `CheckpointError` where there is no such model, saying which way it was looked for.
    """
    name = str(model)
    if name == SHIPPED:
        if revision is not None:
            raise CheckpointError(f"'{SHIPPED}' ships with tinychat and has no revision '{quote(revision)}'")
        return _shipped()
    if not name or len(name) > 4096 or "\0" in name:
        raise CheckpointError(f"'{quote(name)}' is neither a directory nor a hub id (owner/name)")
    path = Path(name)
    try:
        path = path.expanduser()
        exists = path.exists()
    except (OSError, RuntimeError):  # a name too long, no right to look, a ~user that is not there
        exists = False
    if exists:
        if not path.is_dir() and path.suffix != GGUF:
            raise CheckpointError(
                f"{quote(name)} is a file; give the directory that holds config.json and the weights, or a {GGUF} file"
            )
        if revision is not None:
            kind = "directory" if path.is_dir() else "file"
            raise CheckpointError(f"{quote(name)} is a local {kind}, which has no revision '{quote(revision)}'")
        return path
    if isinstance(model, Path) or _PATH_LIKE.match(name):
        raise CheckpointError(
            f"there is no directory '{quote(name)}'; a model is '{SHIPPED}', a directory, or a hub id (owner/name)"
        )
    if not _HUB_ID.fullmatch(name) or ".." in name or "--" in name or name.endswith(".git"):
        raise CheckpointError(
            f"'{quote(name)}' is neither an existing directory nor a hub id: owner/name, each of letters, digits, "
            f"'-', '_' and '.'"
        )
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise CheckpointError(f"'{quote(revision)}' is not a revision: expected is a branch, a tag or a commit")
    return _download(name, revision, offline)


def _shipped() -> Path:
    for path in _SHIPPED_AT:
        if (path / "config.json").exists():
            return path
    raise CheckpointError(
        f"this installation lacks the model '{SHIPPED}' that ships with tinychat: looked in "
        f"{' and '.join(str(path) for path in _SHIPPED_AT)}; install it again, or give a directory or hub id"
    )


def _download(hub_id: str, revision: str | None, offline: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    offline = offline or constants.HF_HUB_OFFLINE
    which = f"{hub_id} at revision {revision}" if revision else hub_id
    page = f"{constants.ENDPOINT}/{hub_id}"
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                local_files_only=offline,
                allow_patterns=list(_WANTED),
                ignore_patterns=list(_UNWANTED),
            )
        )
    except GatedRepoError:
        raise CheckpointError(
            f"{hub_id} is gated: accept its licence at {page}, then set HF_TOKEN to a token of that account"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{hub_id} has no revision '{revision}'; see {page}/tree/main for those it has") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"the hub has no model {hub_id}, or it is private: check the spelling, or set HF_TOKEN to a token that "
            f"may read it (and there is no local directory of that name)"
        ) from None
    except LocalEntryNotFoundError as fault:
        if offline:
            raise CheckpointError(
                f"{which} is not complete in the local cache ({constants.HF_HUB_CACHE}) and the hub is not asked "
                f"(--offline or HF_HUB_OFFLINE): download it once without"
            ) from None
        if isinstance(fault.__cause__, HfHubHTTPError):
            raise _http_error(hub_id, page, fault.__cause__) from None
        raise _unreachable(which, fault.__cause__ or fault) from None
    except HfHubHTTPError as fault:
        raise _http_error(hub_id, page, fault) from None
    except Exception as fault:  # whatever the network layers below throw, which differ between versions of the hub
        raise _unreachable(which, fault) from None


def _http_error(hub_id: str, page: str, fault: Exception) -> CheckpointError:
    status = getattr(getattr(fault, "response", None), "status_code", None)
    if status in (401, 403):
        return CheckpointError(
            f"the hub refuses access to {hub_id} (HTTP {status}): accept its licence at {page} if it has one, and set "
            f"HF_TOKEN to a token of that account"
        )
    if status == 429:
        return CheckpointError(f"the hub limits the rate of requests (HTTP 429): try {hub_id} again in a few minutes")
    return CheckpointError(
        f"the hub failed on {hub_id} (HTTP {status}); try again later, or --offline with a cached copy"
    )


def _unreachable(which: str, fault: BaseException) -> CheckpointError:
    if isinstance(fault, OSError) and fault.errno is not None and fault.strerror:
        return CheckpointError(f"cannot download {which}: {fault.strerror} ({quote(str(fault.filename or 'cache'))})")
    proxy = " through the proxy that the environment names" if os.environ.get("HTTPS_PROXY") else ""
    return CheckpointError(
        f"cannot download {which}{proxy}: {type(fault).__name__}: {quote(str(fault))}. Check the network and try again "
        f"(a broken download resumes), or give --offline with a cached copy"
    )
