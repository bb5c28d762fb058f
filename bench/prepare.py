"""Tokenization: the pipeline of data.prepare against tiktoken alone, and what limits it on many cores.

    python -m bench.prepare --ranks FILE            the prose of the installed packages, a minute
    python -m bench.prepare --memory --ranks FILE   what parent and workers hold at most, of three kinds of source
    python -m bench.prepare --smoke                 the byte tokenizer on a little of it, seconds

Five sides take turns: tiktoken alone on one process, which neither reads nor writes, by its batch call on one thread
and document by document; as many of the latter at once as there are cores, which is what the machine can give; the
pipeline on one process; the pipeline on all cores, worker start-up subtracted. The processor time of the parent
process, which reads, hands out work and writes shards, bounds the rate on any number of cores, so projections take the
smaller of the two. Other work on the machine slows all sides alike, so compare sides, not days.
"""

import argparse
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
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from data.prepare import pydocs
from data.prepare.build import build
from data.prepare.command import cores
from data.prepare.sources import Files, LocalFolder
from data.prepare.split import FirstShard
from data.prepare.workers import Recipe
from data.tokenizer import GPT2Tokenizer, Tokenizer, get_tokenizer

if TYPE_CHECKING:
    from bench.report import Report

CORPORA = {"OpenWebText": 9e9, "FineWeb-Edu 100BT": 100e9}  # tokens


def write_corpus(folder: Path, megabytes: float) -> list[str]:
    """Write documents of about 4 kB of English prose as parquet until there are so many MB; returns them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    prose = "".join(text for _, text, _ in islice(pydocs.documents(), None if megabytes > 1 else 40))
    documents = [prose[i : i + 4000] for i in range(0, len(prose), 4000)]
    size = sum(len(d.encode()) for d in documents)
    documents = (documents * (1 + int(megabytes * 1e6 / size)))[
        : max(1, round(len(documents) * megabytes * 1e6 / size))
    ]
    pq.write_table(pa.table({"text": documents}), folder / "corpus.parquet", row_group_size=250)
    return documents


def processor_time() -> tuple[float, float]:
    """Processor seconds so far of this process, and of its children that have ended."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime, children.ru_utime + children.ru_stime


def encode_all(path: Path, tokenizer: str, ranks: str | None) -> float:
    """Seconds to tokenize a corpus that is in memory already."""
    import pyarrow.parquet as pq

    documents = pq.read_table(path)["text"].to_pylist()
    encode = get_tokenizer(tokenizer, ranks).encode
    start = time.perf_counter()
    for document in documents:
        encode(document)
    return time.perf_counter() - start


def encode_batch(tokenizer: Tokenizer, documents: list[str]) -> None:
    """One call for all documents, on one thread."""
    if isinstance(tokenizer, GPT2Tokenizer):
        tokenizer.encoding.encode_ordinary_batch(documents, num_threads=1)
    else:
        list(map(tokenizer.encode, documents))


def timed(work: Callable[[], object]) -> dict:
    """Wall and processor seconds of something that this process does alone."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return dict(wall=time.perf_counter() - wall, parent=time.process_time() - cpu, workers=0.0)


def pipeline(source: Path, tokenizer: str, ranks: str | None, workers: int, shard_tokens: int) -> dict:
    """Wall and processor seconds of one preparation."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(tokenizer, ranks, "before", FirstShard(), shard_tokens, workers)
        before, start = processor_time(), time.perf_counter()
        build(Path(folder) / "out", Files(LocalFolder(source)), {"name": "bench"}, recipe)
        wall, after = time.perf_counter() - start, processor_time()
    return dict(wall=wall, parent=after[0] - before[0], workers=after[1] - before[1])


def bench(report: "Report", megabytes: float, tokenizer: str, ranks: str | None, rounds: int) -> None:
    """Time the sides in turns and project."""
    alone_tokenizer, many = get_tokenizer(tokenizer, ranks), cores()
    with tempfile.TemporaryDirectory() as folder:
        documents = write_corpus(Path(folder), megabytes)
        size = sum(len(d.encode()) for d in documents) / 1e6
        tokens = sum(len(alone_tokenizer.encode(d)) + 1 for d in documents)
        batch, alone, single, multiple, startup, ceiling = [], [], [], [], [], []
        with tempfile.TemporaryDirectory() as little:
            write_corpus(Path(little), megabytes / 100)
            for _ in range(rounds):
                batch.append(timed(lambda: encode_batch(alone_tokenizer, documents)))
                alone.append(timed(lambda: [len(alone_tokenizer.encode(document)) for document in documents]))
                with ProcessPoolExecutor(many, get_context("spawn")) as pool:
                    job = (encode_all, Path(folder, "corpus.parquet"), tokenizer, ranks)
                    jobs = [pool.submit(*job) for _ in range(many)]
                    ceiling.append(max(done.result() for done in jobs))
                single.append(pipeline(Path(folder), tokenizer, ranks, 1, tokens // 3))
                multiple.append(pipeline(Path(folder), tokenizer, ranks, many, tokens // 3))
                startup.append(pipeline(Path(little), tokenizer, ranks, many, max(1, tokens // 300)))
    sides = {"tiktoken's batch call, 1 process": batch, "tiktoken alone, 1 process": alone}
    sides |= {"pipeline, 1 process": single, f"pipeline, {many} workers": multiple}
    sides[f"pipeline, {many} workers, 1/100 of the text"] = startup
    middle = {name: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for name, rows in sides.items()}
    batch_, alone_, _, multiple_, startup_ = middle.values()
    for name, m in middle.items():
        part = size / 100 if m is startup_ else size
        rate = part / m["wall"]
        report.add(
            side=name, MB=part, wall_s=m["wall"], MB_s=rate, parent_cpu_s=m["parent"], workers_cpu_s=m["workers"]
        )
    steady = (multiple_["wall"] - startup_["wall"]) / 0.99
    most = many * size / statistics.median(ceiling)
    report.add(side=f"tiktoken alone, {many} processes at once", MB_s=most, to_alone=most * alone_["wall"] / size)
    rates = dict(MB_s=size / steady, to_batch=batch_["wall"] / steady, to_alone=alone_["wall"] / steady)
    rates["to_most"] = size / steady / most
    report.add(side=f"{many} workers without start-up", **rates)
    parent = (multiple_["parent"] - startup_["parent"]) / 0.99 / tokens  # processor seconds per token
    worker = (multiple_["workers"] - startup_["workers"]) / 0.99 / tokens
    report.add(side="processor time per million tokens", parent_cpu_s=1e6 * parent, workers_cpu_s=1e6 * worker)
    for corpus, total in CORPORA.items():
        for n in (16, 64):
            hours = total * max(parent, worker / n) / 3600
            limit = "parent" if parent > worker / n else "workers"
            report.add(side=f"projected: {corpus} on {n} cores", hours=hours, limit=limit)


def most_held(source: Path, ranks: str | None, shard_tokens: int) -> dict:
    """Largest resident memory in GB of the parent, of one worker, and of all processes at one time; needs /proc."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "data.prepare", "fineweb_edu", f"--source={source}", f"--out={folder}/out", "--workers=2"]
        command += [f"--shard-tokens={shard_tokens}"]
        command += [f"--ranks={ranks}"] if ranks else ["--tokenizer=byte"]
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        held, together = {}, 0.0
        while process.poll() is None:
            now = 0.0
            with suppress(OSError):  # a process may end while it is looked at
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                for pid in (str(process.pid), *children):
                    facts = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
                    if "VmHWM" in facts:
                        held[pid] = int(facts["VmHWM"].split()[0]) / 1e6
                        now += int(facts["VmRSS"].split()[0]) / 1e6
            together = max(together, now)
            time.sleep(0.05)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed")
    parent = held.pop(str(process.pid))
    return dict(parent_GB=parent, worker_GB=max(held.values()), together_GB=together)


def bench_memory(report: "Report", megabytes: float, ranks: str | None) -> None:
    """A corpus of ordinary documents, one with a document of a fifth of it, and one in a single row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as folder:
        ordinary, enormous, one_group = (Path(folder, name) for name in ("ordinary", "enormous", "one_group"))
        for place in (ordinary, enormous, one_group):
            place.mkdir()
        documents = write_corpus(ordinary, megabytes)
        prose = "".join(documents[: len(documents) // 5])
        with open(enormous / "corpus.jsonl", "w") as f:
            f.writelines(json.dumps({"text": text}) + "\n" for text in (prose, *documents[: len(documents) // 5]))
        some = documents[: len(documents) * 2 // 5]
        pq.write_table(pa.table({"text": some}), one_group / "corpus.parquet", row_group_size=len(some))
        held = (("documents of 4 kB", ordinary, 1), ("one document", enormous, 0.2), ("one row group", one_group, 0.4))
        for name, place, share in held:
            report.add(side=f"memory: {name}", MB=share * megabytes, **most_held(place, ranks, int(1e5 * megabytes)))


def main(argv: list[str] | None = None) -> None:
    import torch  # not at the top: spawned workers import this module again, and would load it

    from bench.report import Report

    parser = argparse.ArgumentParser(prog="bench.prepare")
    parser.add_argument("--smoke", action="store_true", help="byte tokenizer, a little text")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--ranks", help="GPT-2 ranks file, where there is no network")
    parser.add_argument("--megabytes", type=float, help="default: 50, for memory 1000")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    name = "prepare_memory" if args.memory else "prepare"
    report = Report(f"{name}_smoke" if args.smoke else name, torch.device("cpu"))
    if args.memory:
        bench_memory(report, args.megabytes or (1 if args.smoke else 1000), None if args.smoke else args.ranks)
    elif args.smoke:
        bench(report, 0.2, "byte", None, 1)
    else:
        bench(report, args.megabytes or 50, "gpt2", args.ranks, args.rounds)
    report.table()


if __name__ == "__main__":
    main()
