"""Tokenization: the pipeline of data.prepare against tiktoken alone, and what limits it on many cores.

    python -m bench.prepare --ranks FILE            the prose of the installed packages, a minute
    python -m bench.prepare --memory --ranks FILE   the peak memory of parent and workers, for three kinds of source
    python -m bench.prepare --smoke                 the byte tokenizer on a little text, seconds

These sides take turns: tiktoken alone, by its batch call and document by document; one process of the latter per core,
which is the limit of the machine; the pipeline on one process and on all cores. A run on little text measures how long
the workers take to start. The parent process reads, distributes work and writes shards, so its processor time limits
the speed on any number of cores. The projections take the slower of parent and workers. Other work on the machine
slows all sides alike, so compare sides of one run, not runs of different days.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path

from bench.report import Report, bench_parser, results_folder
from data.prepare import pydocs
from data.prepare.build import build
from data.prepare.sources import Files, local_files
from data.prepare.split import FirstShard
from data.prepare.workers import Recipe
from data.tokenizer import GPT2Tokenizer, Tokenizer, get_tokenizer
from runtime.command import at_least, one_line
from runtime.hardware import cores

CORPORA = {"OpenWebText": 9e9, "FineWeb-Edu 100BT": 100e9}  # tokens


def write_parquet(path: Path, documents: list[str], rows_per_group: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": documents}), path, row_group_size=rows_per_group)


def write_corpus(folder: Path, megabytes: float) -> list[str]:
    """Write this much English prose as parquet, in documents of about 4 kB; returns the documents."""
    prose = "".join(text for _, text, _ in islice(pydocs.documents(), None if megabytes > 1 else 40))
    documents = [prose[i : i + 4000] for i in range(0, len(prose), 4000)]
    bytes_per_document = sum(len(d.encode()) for d in documents) / len(documents)
    documents = list(islice(cycle(documents), max(1, round(1e6 * megabytes / bytes_per_document))))
    write_parquet(folder / "corpus.parquet", documents, 250)
    return documents


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Wall-clock and processor seconds of some work, for this process and for the workers that it starts."""

    def processor_seconds(who: int) -> float:
        usage = resource.getrusage(who)
        return usage.ru_utime + usage.ru_stime

    def clocks() -> tuple[float, ...]:
        processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return time.perf_counter(), *map(processor_seconds, processes)

    start = clocks()
    work()
    seconds = (after - before for before, after in zip(start, clocks(), strict=True))
    return dict(zip(("wall_s", "parent_cpu_s", "workers_cpu_s"), seconds, strict=True))


def encode_all(documents: list[str], tokenizer: Tokenizer | str, ranks: str | None = None) -> float:
    """Seconds to tokenize documents one by one."""
    encode = (get_tokenizer(tokenizer, ranks) if isinstance(tokenizer, str) else tokenizer).encode
    start = time.perf_counter()
    for document in documents:
        encode(document)
    return time.perf_counter() - start


def encode_on_all_cores(documents: list[str], tokenizer: str, ranks: str | None, processes: int) -> float:
    """Seconds of the slowest process when each one tokenizes all documents."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        jobs = [pool.submit(encode_all, documents, tokenizer, ranks) for _ in range(processes)]
        return max(job.result() for job in jobs)


def encode_batch(documents: list[str], tokenizer: Tokenizer) -> None:
    """Tokenize documents in one call, on one thread."""
    if isinstance(tokenizer, GPT2Tokenizer):
        tokenizer.encoding.encode_ordinary_batch(documents, num_threads=1)
    else:
        encode_all(documents, tokenizer)


def bench(report: Report, megabytes: float, name: str, ranks: str | None, rounds: int) -> None:
    """Time the sides in turns and project the time for large corpora."""
    tokenizer, many = get_tokenizer(name, ranks), cores()
    with tempfile.TemporaryDirectory() as folder:
        whole, little = Path(folder, "whole"), Path(folder, "little")
        documents = write_corpus(whole, megabytes)
        write_corpus(little, megabytes / 100)
        size = sum(len(d.encode()) for d in documents) / 1e6
        tokens = sum(len(tokenizer.encode(d)) + 1 for d in documents)

        def pipeline(source: Path, workers: int, shard_tokens: int) -> dict[str, float]:
            recipe = Recipe(name, ranks, "before", FirstShard(), max(1, shard_tokens), workers)
            out = Path(tempfile.mkdtemp(dir=folder), "out")
            return timed(lambda: build(out, Files(local_files(source)), {"name": "bench"}, recipe))

        sides = {
            "tiktoken's batch call, 1 process": lambda: timed(lambda: encode_batch(documents, tokenizer)),
            "tiktoken alone, 1 process": lambda: timed(lambda: encode_all(documents, tokenizer)),
            "pipeline, 1 process": lambda: pipeline(whole, 1, tokens // 3),
            f"pipeline, {many} workers": lambda: pipeline(whole, many, tokens // 3),
            f"pipeline, {many} workers, 1/100 of the text": lambda: pipeline(little, many, tokens // 300),
        }
        times: dict[str, list[dict]] = {side: [] for side in sides}
        at_once = []
        for _ in range(rounds):
            for side, measure in sides.items():
                times[side].append(measure())
            at_once.append(encode_on_all_cores(documents, name, ranks, many))
    medians = [{key: statistics.median(t[key] for t in rounds) for key in rounds[0]} for rounds in times.values()]
    for side, median in zip(sides, medians, strict=True):
        part = size / 100 if median is medians[-1] else size
        report.add(side=side, MB=part, MB_s=part / median["wall_s"], **median)
    summarize(report, size, tokens, medians, many, many * size / statistics.median(at_once))


def summarize(report: Report, size: float, tokens: int, medians: list[dict], many: int, most: float) -> None:
    """Rows computed from the sides. size: MB of text. most: MB/s of tiktoken on all cores."""
    batch, alone, _, multiple, startup = medians
    # the difference to 1/100 of the text leaves the time of 99/100 of it, without start-up
    steady = {key: (multiple[key] - startup[key]) / 0.99 for key in multiple}
    to_alone = most * alone["wall_s"] / size
    report.add(side=f"tiktoken alone, {many} processes at once", MB_s=most, to_alone=to_alone)
    rate = size / steady["wall_s"]
    ratios = dict(to_batch=rate * batch["wall_s"] / size, to_alone=rate * alone["wall_s"] / size, to_most=rate / most)
    report.add(side=f"{many} workers without start-up", MB_s=rate, **ratios)
    parent, worker = steady["parent_cpu_s"] / tokens, steady["workers_cpu_s"] / tokens
    report.add(side="processor time per million tokens", parent_cpu_s=1e6 * parent, workers_cpu_s=1e6 * worker)
    for corpus, total in CORPORA.items():
        for n in (16, 64):
            hours = total * max(parent, worker / n) / 3600
            limit = "parent" if parent > worker / n else "workers"
            report.add(side=f"projected: {corpus} on {n} cores", hours=hours, limit=limit)


def peak_memory(source: Path, ranks: str | None, shard_tokens: int) -> dict[str, float]:
    """Peak memory in GB of the parent, of the largest worker, and of all processes together; needs /proc."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "data.prepare", "fineweb_edu", f"--source={source}", f"--out={folder}/out", "--workers=2"]
        command += [f"--shard-tokens={shard_tokens}", f"--ranks={ranks}" if ranks else "--tokenizer=byte"]
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        peaks, together = {}, 0.0
        while process.poll() is None:
            now = 0.0
            with suppress(OSError):  # a process may end before its file is read
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                for pid in (str(process.pid), *children):
                    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
                    if "VmHWM" in status:
                        peaks[pid] = int(status["VmHWM"].split()[0]) / 1e6
                        now += int(status["VmRSS"].split()[0]) / 1e6
            together = max(together, now)
            time.sleep(0.05)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed")
    parent = peaks.pop(str(process.pid))
    return dict(parent_GB=parent, worker_GB=max(peaks.values()), together_GB=together)


def bench_memory(report: Report, megabytes: float, ranks: str | None) -> None:
    """A corpus of ordinary documents, one whose first document is half of it, and one in a single row group."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = write_corpus(folder / "ordinary", megabytes)
        fifth = documents[: len(documents) // 5]
        (folder / "enormous").mkdir()
        with open(folder / "enormous/corpus.jsonl", "w") as f:
            f.writelines(json.dumps({"text": text}) + "\n" for text in ("".join(fifth), *fifth))
        two_fifths = documents[: len(documents) * 2 // 5]
        write_parquet(folder / "one_group/corpus.parquet", two_fifths, len(two_fifths))
        for side, source, part in (
            ("documents of 4 kB", "ordinary", 1),
            ("one document", "enormous", 0.2),
            ("one row group", "one_group", 0.4),
        ):
            peaks = peak_memory(folder / source, ranks, int(1e5 * megabytes))
            report.add(side=f"memory: {side}", MB=part * megabytes, **peaks)


@one_line("bench.prepare")
def main(argv: list[str] | None = None) -> None:
    parser = bench_parser("prepare", __doc__)
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--ranks", help="GPT-2 ranks file, for machines without a network")
    parser.add_argument("--megabytes", type=float, help="default: 50, with --memory 1000")
    parser.add_argument("--rounds", type=at_least(1), default=3)
    args = parser.parse_args(argv)
    report = Report("prepare_memory" if args.memory else "prepare", results_folder(args))
    if args.memory:
        bench_memory(report, args.megabytes or (1 if args.smoke else 1000), None if args.smoke else args.ranks)
    elif args.smoke:
        bench(report, 0.2, "byte", None, 1)
    else:
        bench(report, args.megabytes or 50, "gpt2", args.ranks, args.rounds)
    report.table()


if __name__ == "__main__":
    main()
