"""The model card of an export: README.md with the metadata that the Hugging Face hub reads."""

import json
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from data.shards import MANIFEST, read_manifest
from data.terms import NO_LICENCE, recorded_terms
from eval.run import read_records
from eval.table import cells_of
from runtime.errors import UserError
from runtime.files import read_json
from training.folder import ENVIRONMENT
from training.plot import CURVES
from weights import AVERAGED, Trained

# Identifiers that the hub accepts, from docs/hub/repositories-licenses.md of huggingface/hub-docs, without those that
# belong to families of other models. Any other licence is "other".
LICENSES = Path(__file__).with_name("licenses.txt").read_text(encoding="utf-8").split()
LIMITS = """This model continues text. It is meant for research on training and optimizers. It was not trained to follow
instructions or to answer questions, and nothing was done to make its text true, safe or fair. It can repeat what stands
in its training data, including errors, insults and personal data. Do not use it where its text has consequences for
people.
"""


def check_license(name: str) -> str:
    """A licence identifier. Raises UserError, with the nearest ones, for a name that the hub refuses."""
    if name not in LICENSES:
        near = get_close_matches(name.lower(), LICENSES, n=3, cutoff=0.4) or ["apache-2.0", "mit"]
        raise UserError(f"--license {name}: the hub does not know it; nearest: {', '.join(near)}; for any other: other")
    return name


def check_language(code: str) -> str:
    """A language code. Raises UserError for a form that the hub refuses."""
    if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", code):
        raise UserError(f"--language {code}: must be a code of ISO 639 in two or three small letters, for example en")
    return code


def data_terms(trained: Trained) -> dict[str, str]:
    """The terms of a run's dataset. Without its manifest there is only a licence that says so."""
    path = trained.state.get("config", {}).get("data", {}).get("path")
    if path is None:
        return {"licence": f"{NO_LICENCE}: the checkpoint does not name its data"}
    manifest = Path(path) / MANIFEST
    if not manifest.exists():
        return {"licence": f"{NO_LICENCE}: {Path(path).name} had no {MANIFEST} at the time of the export"}
    return recorded_terms(read_manifest(manifest))


def metadata(trained: Trained, license: str | None, language: str | None, scores: list[dict]) -> str:
    """The metadata in YAML: licence, language, datasets, and the results in the hub's form.

    scores: records of results.json that belong to these weights.
    """
    from huggingface_hub import EvalResult, ModelCardData

    terms, task = data_terms(trained), "text-generation"
    dataset = terms.get("dataset")
    results = []
    if (loss := losses_of(trained).get("val_loss")) is not None:
        name = Path(trained.state["config"]["data"]["path"]).name if "config" in trained.state else "unknown"
        what = {"metric_type": "loss", "metric_name": "validation loss, nats per token", "metric_value": loss}
        results.append(EvalResult(task, dataset or name, name, dataset_split="validation", **what))
    for s in scores:
        for metric, (value, _) in cells_of(s).items():
            shots = {"num_few_shot": s["shots"]}
            what = {"metric_type": metric, "metric_name": f"{metric}, {s['shots']}-shot", "metric_value": value}
            results.append(EvalResult(task, s["task"], s["task"], dataset_args=shots, **what))
    facts: dict[str, Any] = {"license": license, "language": language or terms.get("language")}
    facts |= {"datasets": [dataset] if dataset else None, "tags": ["gpt2"]}
    facts |= {"model_name": trained.name, "eval_results": results} if results else {}
    return ModelCardData(library_name="transformers", pipeline_tag=task, **facts).to_yaml()


def scores_of(path: Path | None, trained: Trained) -> list[dict]:
    """The complete scores of these weights in a results.json. Raises UserError for another file."""
    if path is not None and not path.exists():
        raise UserError(f"--scores {path}: no such file; eval.run writes it")
    records = read_records(path) if path else []
    return [r for r in records if r.get("sha256") == trained.sha256 and not r.get("limit")]


def losses_of(trained: Trained) -> dict[str, float]:
    """The recorded losses of these weights. Those of averaged weights are not in the state of a checkpoint."""
    keys = () if trained.name.endswith(AVERAGED) else ("val_loss", "best_val_loss")
    return {key: trained.state[key] for key in keys if trained.state.get(key) is not None}


def origin(trained: Trained) -> dict[str, object]:
    """Where the weights come from: command, commit, seed, steps, tokens and losses, as far as they were recorded."""
    state, folder = trained.state, trained.run_folder
    environment = folder / ENVIRONMENT if folder else None
    facts = read_json(environment) if environment and environment.exists() else {}
    found: dict[str, object] = {"training command": f"`{facts['command']}`" if facts.get("command") else None}
    if facts.get("commit"):
        changed = " with uncommitted changes" if facts.get("uncommitted_changes") else ""
        found |= {"commit of the training code": f"{facts['commit']}{changed}"}
    found |= {"seed": state.get("config", {}).get("seed")}
    found |= {key: state.get(key) for key in ("code", "step", "tokens")} | losses_of(trained)
    return {key: value for key, value in found.items() if value is not None}


def model_card(
    trained: Trained, difference: float, license: str | None, language: str | None, scores: list[dict], curves: bool
) -> str:
    """README.md of an export.

    difference: largest difference of a logit to the checkpoint. scores: records of results.json of these weights.
    curves: whether the folder has a picture of the loss.
    """
    c, state, tokenizer = trained.model.config, trained.state, trained.tokenizer
    facts: dict[str, object] = {"parameters": f"{trained.model.num_params():,}", "weights sha256": trained.sha256}
    facts |= origin(trained) | {
        "attention also divided by layer + 1": c.scale_attn_by_inverse_layer_idx,
        "GELU": c.gelu,
        "biases in training": c.bias,
        "tokenizer": trained.facts["name"],
        "vocabulary": c.vocab_size,
        "largest logit difference to the checkpoint": f"{difference:.1e}",
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    terms = "".join(f"- {key}: {value}\n" for key, value in data_terms(trained).items())
    settings = ""
    if "config" in state:
        settings = f"\n## Settings of the run\n\n```json\n{json.dumps(state['config'], indent=1)}\n```\n"
    start = ""
    if tokenizer is not None:
        separator = getattr(tokenizer, "separator", "<|endoftext|>")
        start = f" Start texts with `{separator!r}`." if separator == "\n" else f" Start texts with `{separator}`."
    return f"""---
{metadata(trained, license, language, scores)}
---

# {trained.name}

A GPT-2 for `AutoModelForCausalLM` and `AutoTokenizer`. Losses are in nats per
token on the run's validation split.{start}

| | |
|---|---|
{rows}
{f"{chr(10)}![loss]({CURVES}){chr(10)}" if curves else ""}
## Use and limits

{LIMITS}
## Training data

{terms}
Licence of these weights: {license or "not stated"}.
{settings}"""
