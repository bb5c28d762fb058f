"""The real harness, offline, on small models and task files written here."""

import csv
import json
import sys
import types

import pytest
import torch
from small_runs import byte_run, hellaswag, phrase

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

from eval import export, run
from eval.checkpoint import open_trained
from eval.scoring import Scorer
from eval.table import markdown, published, size_of
from eval.tasks import PAPER, Tasks, metric_of

CPU = torch.device("cpu")


def arc(n):
    return [
        dict(
            id=str(i),
            question=f"Which {phrase(i)} has {phrase(i + 4)}?",
            choices=dict(text=[phrase(i + k, *range(k)) for k in (1, 2, 3, 5)], label=["A", "B", "C", "D"]),
            answerKey="ABCD"[(i * 3) % 4],
        )
        for i in range(n)
    ]


def boolq(n):
    return [
        dict(passage=f"A {phrase(i, i + 1)}.", question=f"is it {phrase(i + 2)}", idx=i, label=i % 2) for i in range(n)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, rows, evaluated in (
        ("hellaswag", hellaswag, "validation"),
        ("arc_easy", arc, "test"),
        ("boolq", boolq, "validation"),
    ):
        (folder / name).mkdir()
        for split, count in ((evaluated, 12), ("train", 6)):
            lines = "".join(json.dumps(r) + "\n" for r in rows(count if split == evaluated else 18)[-count:])
            (folder / name / f"{split}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two runs and the export of the first."""
    root = tmp_path_factory.mktemp("runs")
    runs = [byte_run(root, root / "gone", seed, name, block_size=512) for seed, name in ((0, "one"), (1, "two"))]
    export.main([str(runs[0]), str(root / "hf")])
    return [*runs, root / "hf"]


def evaluate(models, data, out, *more):
    tasks = ["--tasks", "hellaswag", "arc_easy", "boolq"] if "--tasks" not in more else []
    run.main([*map(str, models), "--data", str(data), "--out", str(out), "--device", "cpu", *tasks, *more])
    return {
        (s["checkpoint"], s["task"], s["shots"]): s for s in json.loads((out / "results.json").read_text())["scores"]
    }


@pytest.fixture(scope="module")
def scores(folders, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("scores")
    return evaluate(folders, data, out, "--shots", "0", "2", "--published", "small"), out


def logp(model, prompt, continuation):
    ids = list((prompt + continuation).encode())
    with torch.no_grad():
        logs = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    n = len(continuation.encode())
    return logs[-n:].gather(1, torch.tensor(ids[-n:])[:, None]).sum().item()


def by_hand(model, items):
    """acc and acc_norm of (prompt, choices, gold) items; the norm is the number of characters of a choice."""
    plain = normed = 0
    for prompt, choices, gold in items:
        found = [logp(model, prompt, " " + c) for c in choices]
        plain += max(range(len(choices)), key=found.__getitem__) == gold
        normed += max(range(len(choices)), key=lambda i: found[i] / len(choices[i])) == gold
    return plain / len(items), normed / len(items)


def items_of(task):
    if task == "hellaswag":
        return [
            (
                f"{r['activity_label']}: The {r['ctx_a'].split()[1]} is here. {r['ctx_b'].capitalize()}",
                r["endings"],
                int(r["label"]),
            )
            for r in hellaswag(12)
        ]
    if task == "arc_easy":
        return [
            (f"Question: {r['question']}\nAnswer:", r["choices"]["text"], "ABCD".index(r["answerKey"])) for r in arc(12)
        ]
    return [(f"{r['passage']}\nQuestion: {r['question']}?\nAnswer:", ["no", "yes"], r["label"]) for r in boolq(12)]


@pytest.mark.parametrize("task", ["hellaswag", "arc_easy", "boolq"])
@pytest.mark.parametrize("number, name", [(0, "one"), (1, "two")])
def test_scores_equal_a_computation_by_hand(folders, scores, task, number, name):
    got = scores[0][name, task, 0]
    acc, acc_norm = by_hand(open_trained(folders[number], CPU).model, items_of(task))
    assert got["all_metrics"]["acc,none"] == acc
    assert got["score"] == (acc if task == "boolq" else acc_norm)
    assert got["metric"] == PAPER[task][1]
    assert (got["documents"], got["shots"], got["prefix_token"]) == (12, 0, 256)
    p = got["score"]
    assert got["stderr"] == pytest.approx((p * (1 - p) / 11) ** 0.5)


def test_scores_are_not_all_alike(scores):
    assert len({s["score"] for s in scores[0].values()}) > 3


def test_a_checkpoint_and_its_export_give_the_same_numbers(scores):
    for (name, task, shots), score in scores[0].items():
        if name == "one":
            exported = scores[0]["hf", task, shots]
            for key in ("score", "stderr", "metric", "all_metrics", "documents", "tokenizer"):
                assert exported[key] == score[key], (task, shots, key)


def test_the_adapter_agrees_with_the_harness_own_model_of_an_export(folders):
    pytest.importorskip("accelerate")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [(f"{phrase(i, i + 1)} ", phrase(i + 2) + " \u00e9") for i in range(6)] + [
        ("", "bread"),
        ("x" * 900, " y" * 9),
    ]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    theirs = HFLM(pretrained=str(folders[2]), device="cpu", dtype="float32", batch_size=4).loglikelihood(requests)
    trained = open_trained(folders[0], CPU)
    ours = run.harness_model(Scorer(trained.model), trained.tokenizer)
    for a, b in zip(ours.loglikelihood(requests, disable_tqdm=True), theirs, strict=True):
        assert a == (pytest.approx(b[0], rel=1e-4), b[1])
    texts = [Instance("loglikelihood_rolling", {}, (phrase(*range(i)),), i) for i in (5, 200)]
    hflm = HFLM(pretrained=str(folders[2]), device="cpu", dtype="float32", batch_size=4)
    assert ours.loglikelihood_rolling(texts, True) == pytest.approx(hflm.loglikelihood_rolling(texts, True), rel=1e-4)


def test_shots_are_worked_examples_from_the_training_split(data):
    loaded = Tasks(["arc_easy"], data=str(data)).load("arc_easy", 2)
    task = loaded["tasks"]["arc_easy"]
    task.build_all_requests(rank=0, world_size=1)
    answers = [r["choices"]["text"]["ABCD".index(r["answerKey"])] for r in arc(18)]
    trained_on = [f"Question: {r['question']}\nAnswer: {a}" for r, a in list(zip(arc(18), answers, strict=True))[-6:]]
    for request in task.instances:
        *shots, last = request.args[0].split("\n\n")
        assert len(shots) == 2
        assert set(shots) <= set(trained_on)
        assert last.endswith("\nAnswer:")


def test_tables_hold_every_model_and_the_published_rows(scores):
    text = (scores[1] / "table.md").read_text()
    assert "| model | shots | ARC-E acc_norm | BoolQ acc | HellaSwag acc_norm | mean of 9 |" in text
    assert "| published: OpenAI GPT-2, WebText | 0 | 39.48 | 48.72 | 31.14 | 41.19 |" in text
    assert sum(line.startswith(("| one", "| two", "| hf")) for line in text.splitlines()) == 6
    rows = list(csv.DictReader((scores[1] / "table.csv").open()))
    mine = next(r for r in rows if (r["model"], r["shots"]) == ("two", "0"))
    score = scores[0]["two", "boolq", 0]
    assert float(mine["boolq"]) == pytest.approx(100 * score["score"], abs=1e-4)
    assert float(mine["boolq_stderr"]) == pytest.approx(100 * score["stderr"], abs=1e-4)
    assert mine["mean"] == ""


def test_an_interrupted_evaluation_continues_with_what_is_left(folders, data, tmp_path, monkeypatch):
    real, done = run.score_task, []

    def interrupted(trained, scorer, tasks, name, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(name)
        return real(trained, scorer, tasks, name, *rest)

    monkeypatch.setattr(run, "score_task", interrupted)
    with pytest.raises(SystemExit, match="the same command continues"):
        evaluate(folders[:1], data, tmp_path)
    assert done == ["hellaswag", "arc_easy"]
    done.append("a third, so that nothing is interrupted")
    scores = evaluate(folders[:1], data, tmp_path)
    assert done[3:] == ["boolq"]
    assert len(scores) == 3
    evaluate(folders[:1], data, tmp_path)
    assert done[4:] == []


def test_own_task_files_and_the_tokenizer_of_the_run(folders, tmp_path, capsys):
    (tmp_path / "tasks").mkdir()
    rows = [dict(q=phrase(i), a=[phrase(i + 1), phrase(i + 2)], gold=i % 2) for i in range(5)]
    (tmp_path / "tasks" / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "tasks" / "mine.yaml").write_text(
        f"""task: my_pairs
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {tmp_path / "tasks" / "rows.jsonl"}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{q}}}}:"
doc_to_target: gold
doc_to_choice: "{{{{a}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    run.main(
        [str(folders[1]), "--tasks", "my_pairs", "--include_path", str(tmp_path / "tasks"), "--out", str(tmp_path)]
    )
    score = json.loads((tmp_path / "results.json").read_text())["scores"][0]
    items = [(f"{r['q']}:", r["a"], r["gold"]) for r in rows]
    assert score["score"] == by_hand(open_trained(folders[1], CPU).model, items)[0]
    assert (score["metric"], score["tokenizer"], score["harness"]) == ("acc", "byte", "0.4.13")
    assert len(score["sha256"]) == 64
    assert "my_pairs acc" in capsys.readouterr().out


def test_a_data_set_that_cannot_be_had_says_what_to_do_and_the_others_run(folders, data, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1 of the tasks could not be run"):
        evaluate(folders[:1], data, tmp_path, "--tasks", "piqa", "boolq")
    error = capsys.readouterr().err
    line = next(line for line in error.splitlines() if "eval.run: task piqa" in line)
    for words in ("baber/piqa", "huggingface", "datasets/baber___piqa", "piqa/validation.jsonl", "--data"):
        assert words in line
    assert "Traceback" not in error
    assert [s["task"] for s in json.loads((tmp_path / "results.json").read_text())["scores"]] == ["boolq"]


def test_every_task_of_the_paper_is_known_and_names_its_data(folders, tmp_path, capsys):
    with pytest.raises(SystemExit, match="9 of the tasks could not be run"):
        run.main([str(folders[0]), "--out", str(tmp_path), "--device", "cpu"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eval.run: task")]
    assert [line.split()[2].rstrip(":") for line in lines] == list(PAPER)
    assert all("is neither cached nor reachable" in line for line in lines)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "hellaswagg"], 'unknown task "hellaswagg"; nearest: hellaswag'),
        (["--include_path", "nowhere"], "--include_path nowhere: no such folder"),
        (["--data", "nowhere"], "--data nowhere: no such folder"),
        (["--shots", "-1"], "--shots must not be negative"),
        (["--limit", "0"], "--limit and --batch_tokens must be at least 1"),
    ],
)
def test_bad_arguments_are_one_clear_line(folders, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message) as error:
        run.main([str(folders[0]), "--out", str(tmp_path / "out"), *arguments])
    assert "\n" not in str(error.value)


def test_a_results_file_of_something_else_and_a_missing_model(folders, tmp_path):
    (tmp_path / "results.json").write_text("[1, 2]")
    with pytest.raises(SystemExit, match="not a results file"):
        run.main([str(folders[0]), "--tasks", "boolq", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="neither a checkpoint"):
        run.main([str(tmp_path / "nothing"), "--tasks", "boolq", "--out", str(tmp_path / "out")])


def test_scores_go_to_the_runs_wandb_page(folders, data, tmp_path, monkeypatch, capsys):
    place = byte_run(tmp_path, tmp_path / "gone", name="watched", block_size=512)
    (place / "wandb_id").write_text("abc123")
    state = place / "checkpoints" / "step_0000030" / "state.json"
    content = json.loads(state.read_text())
    content["config"]["log"]["wandb"] = "online"
    state.write_text(json.dumps(content))
    page = types.SimpleNamespace(summary={}, finish=lambda: None)
    asked = {}
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **k: asked.update(k) or page))
    score = evaluate([place], data, tmp_path / "out", "--tasks", "boolq")["watched", "boolq", 0]
    assert asked["id"] == "abc123"
    assert page.summary == {"eval/boolq/0-shot/acc": score["score"]}

    def outage(**settings):
        raise OSError("no route")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=outage))
    evaluate([place], data, tmp_path / "out2", "--tasks", "boolq")
    assert "wandb did not take the scores (no route); results.json has them" in capsys.readouterr().out


def test_the_mean_of_published_rows_and_the_sizes():
    row = next(r for r in published()["downstream"] if r["method"] == "MARS-AdamW" and r["size"] == "xl")
    scores = [dict(checkpoint="x", task=t, shots=0, metric=PAPER[t][1], score=0.5, stderr=None) for t in PAPER]
    assert f"{sum(row['scores'].values()) / 9:.2f} |" in markdown(scores, "xl")
    assert "| x | 0 |" + " 50.00 |" * 10 in markdown(scores, "xl")
    assert [size_of(n) for n in (124_000_000, 353_000_000, 1_557_000_000, 3_000_000)] == ["small", "medium", "xl", None]
    assert metric_of("other", {"acc,none": 1, "acc_norm,none": 1, "acc_stderr,none": 1}) == "acc_norm"
    assert metric_of("other", {"alias": "x", "bpb,none": 1, "bpb_stderr,none": 1}) == "bpb"


def test_without_lm_eval_the_pip_line_is_given(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match="benchmark scores need: pip install lm_eval"):
        run.main([str(folders[0]), "--tasks", "boolq", "--out", str(tmp_path)])
