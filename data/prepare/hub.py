"""Files of a Hugging Face dataset repository at one commit.

Only names, footers and bytes are asked for: nothing from the repository is ever run. Parquet files are streamed by
`datasets`, the text column alone, so that nothing but the token shards is written to the disk. Files are named by
the repository's list, so that their order is known and a preparation continues in the middle of the one it was in.
"""

import errno
import fnmatch
import gc
import logging
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from data.prepare.formats import BATCH_ROWS, batched_values, first_line, parquet_rows
from data.prepare.sources import Chunk, SourceFile, parquet_chunks
from data.prepare.workers import undisturbed
from data.shards import DataError

BLOCK_BYTES = 1 << 25  # asked of the hub at a time
READ_ATTEMPTS = 3  # half a minute each, in which Ctrl-C is not heard: pyarrow waits for the file meanwhile
LOCAL = "files you have can be given with --source DIR"


def hub_library() -> object:
    """huggingface_hub; ImportError names the package."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise ImportError("fetching from the hub needs: pip install datasets") from None
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # two lines for each of many attempts
    return huggingface_hub


def endpoint() -> str:
    """Address of the hub, or of a mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def hub_problem() -> str | None:
    """Why the hub cannot be asked for anything, None if it answers; its libraries then use what they have cached.

    Left alone, they try again for half a minute for each thing asked, be it cached or not.
    """
    hub = hub_library()
    try:
        hub.get_session().head(endpoint(), timeout=10)
        return None
    except hub.errors.OfflineModeIsEnabled:
        problem = "HF_HUB_OFFLINE is set"
    except Exception as error:
        if not _of_the_network(error):
            raise
        problem = f"{endpoint()} does not answer"
    import datasets

    hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return problem


@contextmanager
def answers(repo: str, revision: str, file: str = "") -> Iterator[None]:
    """Where the hub is asked for a repository or a file of it; DataError says in one line why there is no answer."""
    errors = hub_library().errors
    site = endpoint()
    where = f"{site}/datasets/{repo}"
    try:
        yield
        return
    except errors.GatedRepoError:
        reason = f"{where} is gated: accept its terms there, then log in with `hf auth login` or HF_TOKEN"
    except errors.RepositoryNotFoundError:
        reason = f"{where}: no such dataset (moved, renamed or private); give its new name with --repo"
    except errors.RevisionNotFoundError:
        reason = f"{where}: no revision {revision}; give a commit or branch of it with --revision, for example main"
    except errors.EntryNotFoundError:
        reason = f"{where}: {file or 'a file'} is missing at revision {revision}"
    except errors.OfflineModeIsEnabled:
        reason = f"HF_HUB_OFFLINE is set, and {repo} has to be fetched; unset it"
    except errors.HfHubHTTPError as error:
        reason = f"{where}: {first_line(error)}; the same command continues"
    except Exception as error:
        if (type(error) is OSError and not error.errno) or type(error).__module__.startswith("pyarrow"):
            reason = f"{where}: {file} cannot be read ({first_line(error)}); the same command continues"
        elif _of_the_network(error):
            reason = f"{site} does not answer ({type(error).__name__}): no network? The same command continues"
        else:
            raise
    raise DataError(f"{reason}; {LOCAL}") from None


def _of_the_network(error: Exception) -> bool:
    """Whether an exception comes from the hub's client or the libraries below it, which have their own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EACCES):
        return False
    clients = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "fsspec")  # httpx2 is one, too
    return isinstance(error, OSError | RuntimeError) or type(error).__module__.startswith(clients)


class HubFolder:
    """The files of a dataset repository that match a pattern, in the order of their names."""

    def __init__(self, repo: str, pattern: str, revision: str) -> None:
        """revision: branch, tag or commit; `self.revision` is the commit it stands for now."""
        api = hub_library().HfApi(endpoint=endpoint())
        self.repo = repo
        with answers(repo, revision):
            self.revision = api.dataset_info(repo, revision=revision).sha
            where = dict(repo_type="dataset", revision=self.revision, recursive=True)
            tree = list(api.list_repo_tree(repo, **where))
        found = {e.path: e for e in tree if hasattr(e, "size") and fnmatch.fnmatch(e.path, pattern)}
        self.files = [SourceFile(n, e.size, e.lfs.sha256 if e.lfs else None) for n, e in sorted(found.items())]
        if not self.files:
            raise DataError(f'{repo} at {self.revision}: no file matches "{pattern}"; name the files with --pattern')

    def download(self, file: SourceFile, folder: Path) -> Path:
        """Path of a file, fetched into a folder unless it is there; what an interruption left is continued."""
        where = dict(repo_type="dataset", revision=self.revision, local_dir=folder, endpoint=endpoint())
        with answers(self.repo, self.revision, file.name):
            return Path(hub_library().hf_hub_download(self.repo, file.name, **where))

    def address(self, file: SourceFile) -> str:
        """What names a file at this commit to `datasets` and to huggingface_hub's file system."""
        return f"hf://datasets/{self.repo}@{self.revision}/{file.name}"

    def documents(self, file: SourceFile, column: str) -> int:
        """Rows of a parquet file, from its footer."""
        files = hub_library().HfFileSystem(endpoint=endpoint(), block_size=1 << 16)
        with answers(self.repo, self.revision, file.name), files.open(self.address(file)) as f:
            return parquet_rows(f, column, f"{self.repo}: {file.name}")

    def chunks(self, file: SourceFile, column: str, start: int) -> Iterator[Chunk]:
        """Chunks of a parquet file from row `start` on, streamed; DataError if the hub ceases to answer."""
        name, rows = f"{self.repo}: {file.name}", self.documents(file, column)
        values = streamed(self.address(file), column, start)
        with answers(self.repo, self.revision, file.name), closing(values):
            yield from parquet_chunks(name, rows, values, start)


def streamed(address: str, column: str, start: int) -> Iterator[bytes | None]:
    """The texts of a column of a parquet file from row `start` on, not yet decoded, by `datasets` from the hub.

    Of the file the column of one row group is held; rows before `start` are fetched and dropped.
    """
    import datasets
    from pyarrow.dataset import ParquetFragmentScanOptions

    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # what it logs, it raises as well
    datasets.config.STREAMING_READ_MAX_RETRIES = READ_ATTEMPTS
    rows = datasets.IterableDataset.from_parquet(
        address,
        columns=[column],
        features=datasets.Features({column: datasets.Value("large_string")}),  # else it reads those of all columns
        batch_size=BATCH_ROWS,
        fragment_scan_options=ParquetFragmentScanOptions(pre_buffer=False),  # else it keeps all row groups read so far
        storage_options={"hf": {"endpoint": endpoint(), "block_size": BLOCK_BYTES}},
    )
    try:
        yield from batched_values(rows.with_format("arrow").iter(BATCH_ROWS), start)
    finally:
        with undisturbed():  # a Ctrl-C in a finalizer would be lost
            del rows
            gc.collect()
            time.sleep(0.1)  # pyarrow's threads let go of the file: an interpreter that ends before them aborts
