"""Tasks of lm-eval: the nine of the papers with their metrics, and any other. Their data: the hub or local files."""

import difflib
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from data.prepare.hub import hub_problem
from runtime.command import first_line
from runtime.errors import UserError

# task: column in the papers' tables, metric. The papers do not name their metrics, but they give rows of OpenAI's
# GPT-2, which are published lm-eval scores: acc_norm (HellaSwag 31.14, PIQA 62.51, SciQ 64.40), and acc for three.
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
PAPER_FOLDERS = ("arc", "super_glue", "hellaswag", "openbookqa", "piqa", "winogrande", "mmlu", "sciq")
FOLDERS = (*PAPER_FOLDERS, "gsm8k", "lambada", "wikitext")  # folders of lm_eval/tasks that are read first
FEWSHOT_SEED = 1234  # lm-eval's default
NOT_FRACTIONS = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "bpb", "bleu", "chrf", "ter"}
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")  # keys of task files
LOCAL = (None, "json", "parquet", "csv", "text")  # dataset_path of tasks that read files
ENDINGS = (".jsonl", ".json", ".parquet")


def reason_of(error: Exception) -> str:
    """Why the data of a task could not be read, in one line."""
    if isinstance(error, KeyError):
        return f"a record has no column {error}"
    hides_its_cause = type(error).__name__ == "DatasetGenerationError"
    return first_line(error.__cause__ if hides_its_cause and isinstance(error.__cause__, Exception) else error)


class Tasks:
    """Finds and loads tasks by name.

    include_path: a folder with more task files (YAML).
    data: a folder with TASK/SPLIT.jsonl or .parquet, which replace the hub. Prompt and metrics stay those of the
    task. A group such as mmlu has one folder for each of its parts (mmlu_anatomy, ...).
    Raises UserError for unknown names, with similar ones, and without lm-eval.
    """

    def __init__(self, names: list[str], include_path: str | None = None, data: str | None = None) -> None:
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise UserError("benchmark scores need: pip install lm_eval") from None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        for option, folder in (("--include_path", include_path), ("--task_data", data)):
            if folder is not None and not Path(folder).is_dir():
                raise UserError(f"{option} {folder}: no such folder")
        more = [Path(include_path)] if include_path else []
        root = Path(lm_eval.__file__).parent / "tasks"
        self.data = Path(data) if data else None
        self.version = lm_eval.__version__
        self.names = list(dict.fromkeys(n for name in names for n in (PAPER if name == "paper" else [name])))
        self._manager = TaskManager(include_defaults=False, include_path=[root / f for f in FOLDERS] + more)
        if not set(self.names) <= set(self._manager.all_tasks):  # reading all thousands of task files takes 15 s
            self._manager = TaskManager(include_path=more or None)
        self._entries = dict(self._manager.task_index)  # as in lm-eval, before local files replace the hub
        for name in self.names:
            if name not in self._manager.all_tasks:
                near = ", ".join(difflib.get_close_matches(name, self._manager.all_tasks, n=3))
                hint = f"nearest: {near}" if near else "python -m lm_eval ls tasks lists them"
                raise UserError(f'unknown task "{name}"; {unreadable_task_file(include_path) or hint}')

    def load(self, name: str, shots: int) -> dict:
        """The input of lm_eval.evaluate for one task. Raises UserError if its data cannot be read."""
        parts = self.parts(name)
        for part in parts if self.data else ():
            self._use_local_files(part, shots)
        remote = [p for p in parts if self._manager.task_index[p].cfg.get("dataset_path") not in LOCAL]
        problem = self.hub_problem if remote else None
        try:
            loaded = self._manager.load([name])
        except Exception as error:  # datasets, the hub's client and its HTTP library raise many types
            raise UserError(self._data_problem(name, remote, problem or reason_of(error))) from None
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=shots)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return loaded

    def parts(self, name: str) -> list[str]:
        """The single tasks of a task, group or tag, without loading their data."""
        entry = self._entries[name]
        children = sorted(entry.tags) if entry.kind.name == "TAG" else []
        if entry.kind.name == "GROUP":
            children = [c if isinstance(c, str) else c.get("task", c.get("group")) for c in entry.cfg["task"]]
        return [p for child in children if child in self._entries for p in self.parts(child)] if children else [name]

    def settings(self, part: str) -> dict:
        """The content of a single task's file; functions appear as names."""
        return self._entries[part].cfg

    @cached_property
    def hub_problem(self) -> str | None:
        """Why the hub cannot be reached, or None if it answers. Asked once, and only for tasks that need it."""
        return hub_problem()

    def _use_local_files(self, part: str, shots: int) -> None:
        """Let a single task read its local folder, if it has one. UserError if a split that it needs is missing."""
        from lm_eval.tasks._yaml_loader import load_yaml

        if self.data is None or not (self.data / part).is_dir():
            return
        folder, entry = self.data / part, self._entries[part]
        task = load_yaml(entry.yaml_path, resolve_func=True)
        found = {s: path for s in splits_of(task) for e in ENDINGS if (path := folder / f"{s}{e}").is_file()}
        needed = [task.get("test_split") or task.get("validation_split")]
        needed += [task.get("fewshot_split") or task.get("training_split")] if shots else []
        if missing := [split for split in needed if split and split not in found]:
            raise UserError(f"task {part}: {folder}/{missing[0]}.jsonl is missing, {shots}-shot needs it")
        task["dataset_path"] = "parquet" if next(iter(found.values())).suffix == ".parquet" else "json"
        task["dataset_name"] = None
        task["dataset_kwargs"] = {"data_files": {split: str(path.resolve()) for split, path in found.items()}}
        task |= {key: None for key in SPLITS if task.get(key) not in found}
        self._manager.task_index[part] = replace(entry, yaml_path=None, cfg=task)

    def _data_problem(self, name: str, remote: list[str], reason: str) -> str:
        """A message for data that could not be read. remote: the parts of the task that read the hub."""
        if not remote:
            return (
                f"task {name}: its data could not be read ({reason}); check data_files in its task file or --task_data"
            )
        task = self.settings(remote[0])
        files = f"{remote[0]}/{{{','.join(splits_of(task))}}}.jsonl"
        files += f" and the same of {len(remote) - 1} more" if len(remote) > 1 else ""
        return (
            f"task {name}: dataset {task['dataset_path']} is neither cached nor reachable ({reason}). On a machine "
            f"with a network run `python -m eval.fetch DIR --tasks {name}`, copy DIR here and give --task_data DIR: "
            f"it holds {files}"
        )


def unreadable_task_file(folder: str | None) -> str:
    """The first task file in a folder that cannot be read, and why; empty if there is none. lm-eval leaves it out."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(Path(folder).rglob("*.yaml")) if folder else []:
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # a YAML file may also include others, or name functions
            return f"{path} cannot be read ({' '.join(str(error).split())})"
    return ""


def splits_of(task: dict) -> list[str]:
    """The splits that a task file names."""
    return list(dict.fromkeys(task[key] for key in SPLITS if task.get(key)))


def factor(metric: str) -> int:
    """What a score is multiplied by in tables: 100 for fractions, which become percent, and 1 for other numbers."""
    return 1 if metric.partition(",")[0] in NOT_FRACTIONS else 100


def metric_of(name: str, numbers: dict) -> str:
    """The metric to report for a task: that of the papers for their tasks, else acc_norm, acc, or its first.

    A metric of filtered answers keeps the filter in its name, as in "exact_match,strict-match".
    """
    present = [key.removesuffix(",none") for key in numbers if "," in key and "_stderr" not in key]
    if not present:
        raise UserError(f"task {name}: it reports no number")
    wanted = [PAPER[name][1]] if name in PAPER else []
    return next((metric for metric in (*wanted, "acc_norm", "acc") if metric in present), present[0])


def metrics_of(name: str, chosen: str, numbers: Mapping) -> list[str]:
    """The metrics that tables show: the chosen one, and acc beside acc_norm for tasks that are not the papers'."""
    both = ["acc", "acc_norm"]
    present = name not in PAPER and chosen in both and all(f"{metric},none" in numbers for metric in both)
    return [chosen, *(metric for metric in both if present and metric != chosen)]
