"""Files of a Hugging Face dataset repository at one commit.

Only names and bytes are read: nothing from the repository is ever executed. Files of text are fetched block by block
as they are read, so that only token shards are written to the disk.
"""

import fnmatch
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from data.prepare.formats import NO_ROOM, SourceFile, library
from data.shards import DataError
from runtime.command import first_line
from runtime.streams import masked

BLOCK_BYTES = 1 << 25  # bytes per request
REFUSALS = {  # class of huggingface_hub's error: our message
    "GatedRepoError": "is gated: accept its terms there, then log in with `hf auth login` or HF_TOKEN",
    "RepositoryNotFoundError": "does not exist (moved, renamed or private); give its new name with --repo",
    "RevisionNotFoundError": "has no revision {revision}; give a commit or branch with --revision, for example main",
}


def hub_library() -> Any:
    """huggingface_hub, without its log lines about each of many attempts."""
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    library("huggingface_hub.errors")
    return library("huggingface_hub")


def endpoint() -> str:
    """Address of the hub, or of a mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def hub_problem() -> str | None:
    """Why the hub cannot be reached, None if it answers. Its libraries then use only what they have cached.

    Without this, they try again for half a minute for each file, even for a cached one.
    """
    hub = hub_library()
    try:
        hub.get_session().head(endpoint(), timeout=10)
        return None
    except hub.errors.OfflineModeIsEnabled:
        problem = "HF_HUB_OFFLINE is set"
    except Exception as error:
        if not _is_network_error(error):
            raise
        problem = masked(f"{endpoint()} does not answer")
    hub.constants.HF_HUB_OFFLINE = library("datasets.config").HF_HUB_OFFLINE = True
    return problem


@contextmanager
def answers(repo: str, revision: str, file: str = "") -> Iterator[None]:
    """Turn errors of the hub, for a repository or for one of its files, into a DataError of one line."""
    errors = hub_library().errors
    where = f"{endpoint()}/datasets/{repo}"
    try:
        yield
    except Exception as error:
        kind = type(error)
        if kind.__name__ in REFUSALS:
            reason = f"{where} {REFUSALS[kind.__name__].format(revision=revision)}"
        elif isinstance(error, errors.HfHubHTTPError | errors.OfflineModeIsEnabled):
            reason = f"{where}: {first_line(error)}; the same command continues"
        elif (kind is OSError and not getattr(error, "errno", None)) or kind.__module__.startswith("pyarrow"):
            reason = f"{where}: {file} cannot be read ({first_line(error)}); the same command continues"
        elif _is_network_error(error):
            reason = f"{endpoint()} does not answer ({kind.__name__}): no network? The same command continues"
        else:
            raise
        raise DataError(f"{masked(reason)}; files you have can be given with --source DIR") from None


def _is_network_error(error: Exception) -> bool:
    """Whether an exception comes from the hub's client or its HTTP libraries."""
    if isinstance(error, OSError):
        return error.filename is None and error.errno not in NO_ROOM
    return type(error).__module__.startswith(("huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "fsspec"))


def hub_files(repo: str, pattern: str, revision: str) -> tuple[str, list[SourceFile]]:
    """The commit that a branch, tag or commit means now, and the files there that match a pattern, by name."""
    api = hub_library().HfApi(endpoint=endpoint())
    with answers(repo, revision):
        commit = api.dataset_info(repo, revision=revision).sha
        tree = list(api.list_repo_tree(repo, repo_type="dataset", revision=commit, recursive=True))
    found = [e for e in tree if hasattr(e, "size") and fnmatch.fnmatch(e.path, pattern)]
    if not found:
        raise DataError(f'{repo} at {commit}: no file matches "{pattern}"; give another --pattern')
    return commit, [
        SourceFile(e.path, e.size, f"{repo}: {e.path}", partial(streamed, repo, commit, e.path), e.lfs and e.lfs.sha256)
        for e in sorted(found, key=lambda e: e.path)
    ]


def download(repo: str, commit: str, name: str, folder: Path) -> Path:
    """Path of a file, fetched into a folder. An interrupted download is continued."""
    where = dict(repo_type="dataset", revision=commit, local_dir=folder, endpoint=endpoint())
    with answers(repo, commit, name):
        return Path(hub_library().hf_hub_download(repo, name, **where))


@contextmanager
def streamed(repo: str, revision: str, name: str) -> Iterator[BinaryIO]:
    """A file of a repository, read from the hub in blocks. Raises DataError if the hub does not answer."""
    files = hub_library().HfFileSystem(endpoint=endpoint(), block_size=BLOCK_BYTES)
    with answers(repo, revision, name), files.open(f"datasets/{repo}@{revision}/{name}") as f:
        yield f
