"""Files of a Hugging Face dataset repository at one commit, fetched one after the other.

Only names, footers and bytes are asked for: nothing from the repository is ever run. A fetched file is
dropped once its tokens are written, and the next one is fetched while this one is tokenized. The parquet files
are read by row group rather than through `datasets`, whose cache would hold a second copy of the corpus: so a
preparation continues at a row group, workers read for themselves, and only pyarrow and the hub's client are needed.
"""

import errno
import fnmatch
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from data.formats import first_line, parquet_rows
from data.shards import DataError
from data.sources import SourceFile

T = TypeVar("T")
LOCAL = "files you have can be given with --source DIR"


def hub_library() -> object:
    """huggingface_hub; ImportError names the package."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise ImportError("fetching from the hub needs: pip install datasets") from None
    return huggingface_hub


def endpoint() -> str:
    """Address of the hub, or of a mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def asked(repo: str, revision: str, question: Callable[[], T]) -> T:
    """Answer of the hub to a question on a repository; DataError says in one line why there is none."""
    errors = hub_library().errors
    site = endpoint()
    where = f"{site}/datasets/{repo}"
    try:
        return question()
    except errors.GatedRepoError:
        reason = f"{where} is gated: accept its terms there, then log in with `hf auth login` or HF_TOKEN"
    except errors.RepositoryNotFoundError:
        reason = f"{where}: no such dataset (moved, renamed or private); give its new name with --repo"
    except errors.RevisionNotFoundError:
        reason = f"{where}: no revision {revision}; give a commit or branch of it with --revision"
    except errors.EntryNotFoundError as error:
        reason = f"{where}: a file is missing at revision {revision} ({first_line(error)})"
    except errors.OfflineModeIsEnabled:
        reason = f"HF_HUB_OFFLINE is set, and {repo} has to be fetched; unset it"
    except errors.HfHubHTTPError as error:
        reason = f"{where}: {first_line(error)}; the same command continues"
    except Exception as error:
        if not _of_the_network(error):
            raise
        reason = f"{site} does not answer ({type(error).__name__}): no network? The same command continues"
    raise DataError(f"{reason}; {LOCAL}") from None


def _of_the_network(error: Exception) -> bool:
    """Whether an exception comes from the hub's client or the libraries below it, which have their own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EACCES):
        return False
    clients = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "fsspec")  # httpx2 is one, too
    return isinstance(error, OSError | RuntimeError) or type(error).__module__.startswith(clients)


class HubFolder:
    """The files of a dataset repository that match a pattern, in the order of their names."""

    def __init__(self, repo: str, pattern: str, revision: str, cache: Path) -> None:
        """revision: branch, tag or commit; `self.revision` is the commit it stands for now."""
        api = hub_library().HfApi(endpoint=endpoint())
        self.repo, self.cache = repo, cache
        self.revision = asked(repo, revision, lambda: api.dataset_info(repo, revision=revision)).sha
        where = dict(repo_type="dataset", revision=self.revision, recursive=True)
        tree = asked(repo, revision, lambda: list(api.list_repo_tree(repo, **where)))
        found = {e.path: e for e in tree if hasattr(e, "size") and fnmatch.fnmatch(e.path, pattern)}
        self.files = [SourceFile(n, e.size, e.lfs.sha256 if e.lfs else None) for n, e in sorted(found.items())]
        if not self.files:
            raise DataError(f'{repo} at {self.revision}: no file matches "{pattern}"; name the files with --pattern')
        self._ahead: tuple[SourceFile, threading.Thread, list[Path | Exception]] | None = None

    def fetch(self, file: SourceFile) -> Path:
        """Path of a file, fetched now unless it is there; the next one is then on its way."""
        if self._ahead and self._ahead[0] == file:
            _, thread, box = self._ahead
            thread.join()
            if isinstance(box[0], Exception):
                raise box[0]
            path = box[0]
        else:
            path = self._download(file)
        after = self.files.index(file) + 1
        self._ahead = self._fetch_ahead(self.files[after]) if after < len(self.files) else None
        return path

    def _fetch_ahead(self, file: SourceFile) -> tuple[SourceFile, threading.Thread, list[Path | Exception]]:
        box: list[Path | Exception] = []

        def work() -> None:
            try:
                box.append(self._download(file))
            except Exception as error:  # raised where the file is asked for
                box.append(error)

        thread = threading.Thread(target=work, daemon=True, name="fetch")  # a download must not hold up Ctrl-C
        thread.start()
        return file, thread, box

    def _download(self, file: SourceFile) -> Path:
        hub = hub_library()
        where = dict(repo_type="dataset", revision=self.revision, local_dir=self.cache, endpoint=endpoint())
        return Path(asked(self.repo, self.revision, lambda: hub.hf_hub_download(self.repo, file.name, **where)))

    def release(self, file: SourceFile) -> None:
        """Drop a fetched file."""
        (self.cache / file.name).unlink(missing_ok=True)

    def documents(self, column: str) -> int:
        """Rows of all parquet files, from their footers alone."""
        hub = hub_library()
        files = hub.HfFileSystem(endpoint=endpoint())
        total = 0
        for file in self.files:
            path = f"datasets/{self.repo}@{self.revision}/{file.name}"

            def rows(path: str = path, name: str = file.name) -> int:
                with files.open(path, "rb", block_size=1 << 16) as f:
                    return parquet_rows(f, column, f"{self.repo}: {name}")

            total += asked(self.repo, self.revision, rows)
        return total
