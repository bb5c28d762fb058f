"""The papers' nine tasks with their metrics, and any other task of lm-eval, from the hub or from local files."""

import difflib
import logging
import os
from pathlib import Path

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
SPLITS = {"train": "training_split", "validation": "validation_split", "test": "test_split"}


class Tasks:
    """Finds and loads tasks by name.

    include_path: folder of task files (YAML) of one's own. data: folder with TASK/train.jsonl,
    TASK/validation.jsonl and TASK/test.jsonl (or .parquet), read instead of the hub for a known task's prompt.
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
            raise ValueError(f"--data {data}: no such folder")
        own = [Path(include_path)] if include_path else []
        root = Path(lm_eval.__file__).parent / "tasks"
        self.data = Path(data) if data else None
        self.version = lm_eval.__version__
        self.names = list(dict.fromkeys(n for name in names for n in (PAPER if name == "paper" else [name])))
        self._manager = TaskManager(include_defaults=False, include_path=[root / f for f in FOLDERS] + own)
        if not set(self.names) <= set(self._manager.all_tasks):  # reading all thousands of task files takes 15 s
            self._manager = TaskManager(include_path=own or None)
        known = set(self._manager.all_tasks)
        for name in self.names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3)
                hint = f"nearest: {', '.join(near)}" if near else "python -m lm_eval ls tasks lists them"
                raise ValueError(f'unknown task "{name}"; {hint}')

    def load(self, name: str, shots: int) -> dict:
        """What lm_eval.evaluate takes for one task. Raises ValueError if its data cannot be had."""
        local = self._local_files(name)
        try:
            loaded = self._manager.load([self._with_local_data(name, local) if local else name])
        except Exception as error:  # datasets, hub and HTTP library each raise their own
            raise ValueError(self._data_problem(name, error)) from None
        if local:
            loaded = {"tasks": loaded["tasks"], "groups": {}, "group_map": {}}
        for task in loaded["tasks"].values():
            if task.config.num_fewshot != 0 or shots == 0:  # a task file that says 0 means it
                task.set_config(key="num_fewshot", value=shots)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return loaded

    def _local_files(self, name: str) -> dict[str, str]:
        """Split to absolute path of the local files of a task."""
        if self.data is None:
            return {}
        found = [(s, self.data / name / f"{s}{end}") for s in SPLITS for end in (".jsonl", ".json", ".parquet")]
        return {split: str(path.resolve()) for split, path in found if path.is_file()}

    def _with_local_data(self, name: str, files: dict[str, str]) -> dict:
        """The task with its own prompt and metrics and other data; a group is what lets it inherit."""
        form = "parquet" if next(iter(files.values())).endswith(".parquet") else "json"
        splits = {key: split if split in files else None for split, key in SPLITS.items()}
        change = {"dataset_path": form, "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        return {"group": f"local_{name}", "task": [{"task": name, **change, **splits}]}

    def _data_problem(self, name: str, error: Exception) -> str:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        source = self._source(name)
        if source in (None, "json", "parquet", "csv", "text"):
            return f"task {name}: its data could not be read ({reason}); check data_files in its task file or --data"
        cache = os.environ.get("HF_DATASETS_CACHE") or os.path.join(
            os.environ.get("HF_HOME", "~/.cache/huggingface"), "datasets"
        )
        folder = source.replace("/", "___")
        return (
            f"task {name}: data set {source} is neither cached nor reachable ({reason}). Run the same command once on "
            f"a machine with a network and copy {cache}/{folder} from there to {cache}/{folder} here (HF_HUB_OFFLINE=1 "
            f"then skips the network); or put the rows, one JSON object a line, into {name}/validation.jsonl, "
            "test.jsonl and train.jsonl, as it has them, below a folder given with --data"
        )

    def _source(self, name: str) -> str | None:
        """The hub's name of a task's data set, from its task file, without loading it."""
        from lm_eval.tasks._yaml_loader import load_yaml

        for candidate in (name, f"{name}_abstract_algebra"):  # mmlu is a group; its parts share their data set
            entry = self._manager.task_index.get(candidate)
            if entry is not None and entry.yaml_path is not None:
                source = load_yaml(entry.yaml_path, resolve_func=False).get("dataset_path")
                if source:
                    return source
        return None


def metric_of(name: str, numbers: dict) -> str:
    """The metric a task is reported by: the papers' for theirs, else acc_norm, acc, or its first."""
    present = [key.removesuffix(",none") for key in numbers if key.endswith(",none") and "_stderr" not in key]
    if name in PAPER and PAPER[name][1] in present:
        return PAPER[name][1]
    for metric in (*("acc_norm", "acc"), *present):
        if metric in present:
            return metric
    raise ValueError(f"task {name}: it reports no number")
