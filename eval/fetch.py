"""Downloads the data of benchmark tasks, for machines without a network: python -m eval.fetch DIR --tasks paper

Writes DIR/TASK/SPLIT.jsonl for the splits that each task reads. `python -m eval.run ... --task_data DIR` reads them.
Existing files are kept, so the same command continues an interrupted one.
"""

import sys
from pathlib import Path

from eval.tasks import Tasks, splits_of
from runtime.command import Parser, first_line, one_line
from runtime.errors import UserError
from runtime.files import lock_of

AGAIN = "the same command continues"


def fetch(tasks: Tasks, name: str, folder: Path) -> list[Path]:
    """Write the data of a task, or of each task of a group; returns the files written. UserError if that fails."""
    import datasets

    written = []
    for part in tasks.parts(name):
        task = tasks.settings(part)
        source, options = task["dataset_path"], task.get("dataset_kwargs") or {}
        paths = {split: folder / part / f"{split}.jsonl" for split in splits_of(task)}
        missing = {split: path for split, path in paths.items() if not path.exists()}
        if not missing:
            continue
        try:
            found = datasets.load_dataset(source, task.get("dataset_name"), **options)
        except Exception as error:  # datasets, the hub's client and its HTTP library raise many types
            raise UserError(f"task {part}: dataset {source}: {first_line(error)}; {AGAIN}") from None
        (folder / part).mkdir(parents=True, exist_ok=True)
        for split, path in missing.items():
            with lock_of(path):  # another fetch may be writing it
                temporary = path.with_suffix(".tmp")
                found[split].to_json(temporary)
                temporary.replace(path)
            written.append(path)
    return written


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="eval.fetch", description="Fetch the data of benchmark tasks into a folder.")
    parser.add_argument("folder", type=Path, help="folder to write TASK/SPLIT.jsonl into")
    parser.add_argument("--tasks", nargs="+", default=["paper"], help='"paper" (the nine of the papers) or task names')
    args = parser.parse_args(argv)
    with one_line("eval.fetch", f"interrupted; {AGAIN}"):
        tasks = Tasks(args.tasks)
        if tasks.hub_problem:
            print(f"eval.fetch: {tasks.hub_problem}; only cached data can be written", file=sys.stderr)
        for name in tasks.names:
            written = fetch(tasks, name, args.folder)
            print(f"{name}: {len(written)} files written", flush=True)


if __name__ == "__main__":
    main()
