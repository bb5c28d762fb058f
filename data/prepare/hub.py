"""Files of a Hugging Face dataset repository at one commit.

Only names and bytes are read: nothing from the repository is ever executed. Of a parquet file, the row groups are
fetched as they are needed, so that only token shards are written to the disk.
"""

import errno
import fnmatch
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.prepare.formats import first_line, library, open_parquet
from data.prepare.sources import Chunk, SourceFile, parquet_chunks
from data.shards import DataError

BLOCK_BYTES = 1 << 25  # fetched at a time
REFUSALS = {  # by the class of huggingface_hub's error
    "GatedRepoError": "is gated: accept its terms there, then log in with `hf auth login` or HF_TOKEN",
    "RepositoryNotFoundError": "does not exist (moved, renamed or private); give its new name with --repo",
    "RevisionNotFoundError": "has no revision {revision}; give a commit or branch with --revision, for example main",
}


def hub_library() -> Any:
    """huggingface_hub, without its two log lines for each of many attempts."""
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
        problem = f"{endpoint()} does not answer"
    hub.constants.HF_HUB_OFFLINE = library("datasets.config").HF_HUB_OFFLINE = True
    return problem


@contextmanager
def answers(repo: str, revision: str, file: str = "") -> Iterator[None]:
    """Turn errors in asking the hub for a repository, or for a file of it, into DataError of one line."""
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
        elif (kind is OSError and not error.errno) or kind.__module__.startswith("pyarrow"):
            reason = f"{where}: {file} cannot be read ({first_line(error)}); the same command continues"
        elif _is_network_error(error):
            reason = f"{endpoint()} does not answer ({kind.__name__}): no network? The same command continues"
        else:
            raise
        raise DataError(f"{reason}; files you have can be given with --source DIR") from None


def _is_network_error(error: Exception) -> bool:
    """Whether an exception comes from the hub's client or from the HTTP libraries that it uses."""
    if isinstance(error, OSError):
        return error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EACCES)
    return type(error).__module__.startswith(("huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "fsspec"))


class HubFolder:
    """The files of a dataset repository that match a pattern, in the order of their names."""

    def __init__(self, repo: str, pattern: str, revision: str) -> None:
        """revision: branch, tag or commit; `self.revision` is the commit that it means now."""
        api = hub_library().HfApi(endpoint=endpoint())
        self.repo = repo
        with answers(repo, revision):
            self.revision = api.dataset_info(repo, revision=revision).sha
            tree = list(api.list_repo_tree(repo, repo_type="dataset", revision=self.revision, recursive=True))
        found = {e.path: e for e in tree if hasattr(e, "size") and fnmatch.fnmatch(e.path, pattern)}
        self.files = [SourceFile(n, e.size, e.lfs.sha256 if e.lfs else None) for n, e in sorted(found.items())]
        if not self.files:
            raise DataError(f'{repo} at {self.revision}: no file matches "{pattern}"; name the files with --pattern')

    def download(self, file: SourceFile, folder: Path) -> Path:
        """Path of a file, fetched into a folder. An interrupted download is continued."""
        where = dict(repo_type="dataset", revision=self.revision, local_dir=folder, endpoint=endpoint())
        with answers(self.repo, self.revision, file.name):
            return Path(hub_library().hf_hub_download(self.repo, file.name, **where))

    @contextmanager
    def _parquet(self, file: SourceFile, column: str) -> Iterator[Any]:
        """A pyarrow ParquetFile that reads from the hub."""
        address = f"datasets/{self.repo}@{self.revision}/{file.name}"
        files = hub_library().HfFileSystem(endpoint=endpoint(), block_size=BLOCK_BYTES)
        with answers(self.repo, self.revision, file.name), files.open(address) as f:
            yield open_parquet(f, column, f"{self.repo}: {file.name}")

    def documents(self, file: SourceFile, column: str) -> int:
        """Rows of a parquet file."""
        with self._parquet(file, column) as parquet:
            return parquet.metadata.num_rows

    def chunks(self, file: SourceFile, column: str, start: int) -> Iterator[Chunk]:
        """Chunks of a parquet file from row `start` on. Raises DataError if the hub stops answering."""
        with self._parquet(file, column) as parquet:
            yield from parquet_chunks(parquet, column, f"{self.repo}: {file.name}", start)
