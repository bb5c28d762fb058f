"""Whether losses of runs may be compared, and the settings by which the runs differ."""

import json
import math
from collections.abc import Sequence
from typing import Any, TypeVar

from data.tokenizer import facts_by_size
from training.run_config import RunConfig, default_values

MEASURED_ON = "measured_on"  # key of evaluations in metrics.jsonl; those of older versions lack it
NOT_COMPARED = ("name", "log", "checkpoint")  # settings that do not change what a run computes
Item = TypeVar("Item")


def measured_on(config: dict, record: dict) -> dict[str, Any]:
    """What an evaluation was measured on: by its record, or else by the settings of its run."""
    return record.get(MEASURED_ON) or _stated(config)


def comparable(a: tuple[dict, dict], b: tuple[dict, dict]) -> bool:
    """Whether two evaluations, each a config.json and a record, were measured on the same data."""
    if all(record.get(MEASURED_ON) for _, record in (a, b)):
        return a[1][MEASURED_ON] == b[1][MEASURED_ON]
    return _stated(a[0]) == _stated(b[0])


def _stated(config: dict) -> dict[str, Any]:
    """What config.json says of the validation set; the fingerprint of the dataset stands for its path, if known."""
    data, model = config.get("data") or {}, config.get("model") or {}
    facts = {"data": config.get("dataset") or data.get("path"), "windows": data.get("val_windows")}
    return facts | {"sampling": data.get("val_sampling", "fixed"), "window": model.get("block_size")}


def groups_of(items: Sequence[Item], evaluations: Sequence[tuple[dict, dict]]) -> list[list[Item]]:
    """Items in groups whose evaluations are comparable."""
    groups: list[tuple[tuple[dict, dict], list[Item]]] = []
    for item, evaluation in zip(items, evaluations, strict=True):
        group = next((found for first, found in groups if comparable(first, evaluation)), None)
        if group is None:
            groups.append((evaluation, [item]))
        else:
            group.append(item)
    return [found for _, found in groups]


def tokenizer_name(config: dict, record: dict) -> str:
    """The name of a run's tokenizer; the size of the vocabulary if none is recorded."""
    size = config["model"]["vocab_size"]
    return measured_on(config, record).get("tokenizer") or (facts_by_size(size) or {}).get("name") or f"{size} ids"


def bytes_per_token(record: dict) -> float | None:
    """UTF-8 bytes per token of the validation text, by the record of an evaluation; None if not known."""
    if (bits := record.get("val_bits_per_byte")) and math.isfinite(bits):
        return record["val_loss"] / bits / math.log(2)
    return (record.get(MEASURED_ON) or {}).get("bytes_per_token")


def different_settings(configs: Sequence[dict], records: Sequence[dict]) -> list[list[str]]:
    """A row for each setting that differs between runs: its key and its value in each run.

    configs, records: config.json and the last evaluation of each run. Settings that only some of the optimizers have
    share one row.
    """
    defaults = {key: value for key, value in default_values(RunConfig()).items() if not key.startswith("optim.")}
    runs = [defaults | _flat(config) for config in configs]
    if all(record.get(MEASURED_ON) for record in records):
        for run, record in zip(runs, records, strict=True):
            run |= {f"measured on: {key}": value for key, value in record[MEASURED_ON].items()}
    rows, own = [], [dict[str, Any]() for _ in runs]
    for key in dict.fromkeys(key for run in runs for key in run):
        if key.split(".")[0] in NOT_COMPARED:
            continue
        if key.startswith("optim.") and not all(key in run for run in runs):
            for settings, run in zip(own, runs, strict=True):
                settings |= {key.partition(".")[2]: run[key]} if key in run else {}
        elif len({json.dumps(run.get(key)) for run in runs}) > 1:
            rows.append([key, *(_text(run.get(key)) for run in runs)])
    if len({json.dumps(settings, sort_keys=True) for settings in own}) > 1:
        rows.append(["optim, other", *(", ".join(f"{k}={_text(v)}" for k, v in settings.items()) for settings in own)])
    return rows


def _flat(config: dict) -> dict[str, Any]:
    nested = {key: value if isinstance(value, dict) else {"": value} for key, value in config.items()}
    return {f"{a}.{b}" if b else a: value for a, part in nested.items() for b, value in part.items()}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)[:60]
