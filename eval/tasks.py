"""The papers' nine tasks with their metrics, and any other task of lm-eval, from the hub or from local files."""

import difflib
import logging
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from data.prepare.formats import first_line
from data.prepare.hub import hub_problem

# task: column in the papers' tables, metric. The metrics follow from the papers' rows of OpenAI's GPT-2, which
# are published harness scores in acc_norm (HellaSwag 31.14, PIQA 62.51, SciQ 64.40) or, for these three, acc.
PAPER = {
    "arc_easy": ("ARC-E", "acc_norm"),
    "arc_challenge": ("ARC-C", "acc_norm"),
    "boolq": ("BoolQ", "acc"),
    "hellaswag": ("HellaSwag", "acc_norm"),
    "openbookqa": ("OBQA", "acc_norm"),
    "piqa": ("PIQA", "acc_norm"),
    "winogrande": ("WG", "acc"),
    "mmlu": ("MMLU", "acc"),
    "sciq": ("SciQ", "acc_norm"),
}
FOLDERS = ("arc", "super_glue", "hellaswag", "openbookqa", "piqa", "winogrande", "mmlu", "sciq")  # of lm_eval/tasks
FEWSHOT_SEED = 1234  # lm-eval's own default
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")  # keys of task files
LOCAL = (None, "json", "parquet", "csv", "text")  # dataset_path of tasks that read files
ENDINGS = (".jsonl", ".json", ".parquet")


class Tasks:
    """Finds and loads tasks by name.

    include_path: folder of task files (YAML) of one's own. data: folder with TASK/SPLIT.jsonl (or .parquet), rows
    of the splits that a task reads, used instead of the hub under the task's own prompt and metrics; a group such
    as mmlu has a folder for each of its parts (mmlu_anatomy, ...).
    Raises ValueError for unknown names (with the nearest), ImportError without lm-eval.
    """

    def __init__(self, names: list[str], include_path: str | None = None, data: str | None = None) -> None:
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise ImportError("benchmark scores need: pip install lm_eval") from None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if include_path is not None and not Path(include_path).is_dir():
            raise ValueError(f"--include_path {include_path}: no such folder")
        if data is not None and not Path(data).is_dir():
            raise ValueError(f"--task_data {data}: no such folder")
        own = [Path(include_path)] if include_path else []
        root = Path(lm_eval.__file__).parent / "tasks"
        self.data = Path(data) if data else None
        self.version = lm_eval.__version__
        self.names = list(dict.fromkeys(n for name in names for n in (PAPER if name == "paper" else [name])))
        self._manager = TaskManager(include_defaults=False, include_path=[root / f for f in FOLDERS] + own)
        if not set(self.names) <= set(self._manager.all_tasks):  # reading all thousands of task files takes 15 s
            self._manager = TaskManager(include_path=own or None)
        self._entries = dict(self._manager.task_index)  # as lm-eval has them, before local files take the hub's place
        known = set(self._manager.all_tasks)
        for name in self.names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3)
                hint = f"nearest: {', '.join(near)}" if near else "python -m lm_eval ls tasks lists them"
                raise ValueError(f'unknown task "{name}"; {hint}')

    def load(self, name: str, shots: int) -> dict:
        """What lm_eval.evaluate takes for one task. Raises ValueError if its data cannot be had."""
        if self.data is not None:
            for part in self.parts(name):
                self._use_local_files(part, shots)
        problem = self.hub_problem if self._on_the_hub(name) else None
        try:
            loaded = self._manager.load([name])
        except Exception as error:  # datasets, hub and HTTP library each raise their own
            raise ValueError(self._data_problem(name, problem or first_line(error))) from None
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=shots)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return loaded

    def parts(self, name: str) -> list[str]:
        """The single tasks of a task, group or tag, without their data."""
        entry = self._entries[name]
        children = sorted(entry.tags) if entry.kind.name == "TAG" else []
        if entry.kind.name == "GROUP":
            children = [c if isinstance(c, str) else c.get("task", c.get("group")) for c in entry.cfg["task"]]
        return [p for child in children if child in self._entries for p in self.parts(child)] if children else [name]

    def settings(self, part: str) -> dict:
        """What the task file of a single task says, functions as names."""
        return self._entries[part].cfg

    def _use_local_files(self, part: str, shots: int) -> None:
        """Let a single task read its folder, if there is one. ValueError if a split that it needs is not in there."""
        from lm_eval.tasks._yaml_loader import load_yaml

        folder, entry = self.data / part, self._entries[part]
        if not folder.is_dir():
            return
        task = load_yaml(entry.yaml_path, resolve_func=True)
        found = {s: path for s in splits_of(task) for e in ENDINGS if (path := folder / f"{s}{e}").is_file()}
        needed = [task.get("test_split") or task.get("validation_split")]
        needed += [task.get("fewshot_split") or task.get("training_split")] if shots else []
        if missing := [split for split in needed if split and split not in found]:
            raise ValueError(f"task {part}: {folder}/{missing[0]}.jsonl is missing, {shots}-shot needs it")
        task["dataset_path"] = "parquet" if next(iter(found.values())).suffix == ".parquet" else "json"
        task["dataset_name"] = None
        task["dataset_kwargs"] = {"data_files": {split: str(path.resolve()) for split, path in found.items()}}
        task |= {key: None for key in SPLITS if task.get(key) not in found}
        self._manager.task_index[part] = replace(entry, yaml_path=None, cfg=task)

    @cached_property
    def hub_problem(self) -> str | None:
        """Why the hub cannot be asked, None if it answers; found out once, and only for tasks that need it."""
        return hub_problem()

    def _on_the_hub(self, name: str) -> list[str]:
        """The single tasks of a task that read a dataset of the hub."""
        parts = [p for p in self.parts(name) if self.data is None or not (self.data / p).is_dir()]
        return [p for p in parts if self.settings(p).get("dataset_path") not in LOCAL]

    def _data_problem(self, name: str, reason: str) -> str:
        parts = self._on_the_hub(name)
        if not parts:
            return f"task {name}: its data could not be read ({reason}); check data_files in its task file or --data"
        source, splits = self.settings(parts[0])["dataset_path"], ",".join(splits_of(self.settings(parts[0])))
        files = f"{parts[0]}/{{{splits}}}.jsonl"
        files += f" and the same of {len(parts) - 1} more" if len(parts) > 1 else ""
        return (
            f"task {name}: dataset {source} is neither cached nor reachable ({reason}). On a machine with a network "
            f"run `python -m eval.fetch DIR --tasks {name}`, copy DIR here and give --task_data DIR: it holds {files}"
        )


def splits_of(task: dict) -> list[str]:
    """The splits that a task file names."""
    return list(dict.fromkeys(task[key] for key in SPLITS if task.get(key)))


def metric_of(name: str, numbers: dict) -> str:
    """The metric a task is reported by: the papers' for theirs, else acc_norm, acc, or its first."""
    present = [key.removesuffix(",none") for key in numbers if key.endswith(",none") and "_stderr" not in key]
    if name in PAPER and PAPER[name][1] in present:
        return PAPER[name][1]
    for metric in (*("acc_norm", "acc"), *present):
        if metric in present:
            return metric
    raise ValueError(f"task {name}: it reports no number")
