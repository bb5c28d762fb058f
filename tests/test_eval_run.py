"""Benchmark scores by the real lm-eval, offline, on small models with small data files."""

import csv
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, change_state, environment, finish
from forked import Forked
from small_runs import byte_run, hellaswag, phrase

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

from eval import export, fetch, run
from eval.scoring import Scorer
from eval.table import markdown, published, size_of
from eval.tasks import PAPER, Tasks, metric_of
from runtime.command import one_line
from weights import open_trained

datasets = pytest.importorskip("datasets")
lm_eval_tasks = pytest.importorskip("lm_eval.tasks")

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


def openbookqa(n):
    return [dict(r, question_stem=r["question"]) for r in arc(n)]


def piqa(n):
    return [dict(goal=phrase(i, i + 2), sol1=phrase(i + 1), sol2=phrase(i + 5), label=i % 2) for i in range(n)]


def winogrande(n):
    return [
        dict(
            sentence=f"The {phrase(i)} took _ home.",
            option1=phrase(i + 1),
            option2=phrase(i + 4),
            answer=f"{1 + i % 2}",
        )
        for i in range(n)
    ]


def sciq(n):
    wrong = [[phrase(i + k) for k in (1, 2, 3)] for i in range(n)]
    return [
        dict(
            **dict(support=f" A {phrase(i, i)}.", question=phrase(i + 2), correct_answer=phrase(i + 4)),
            **{f"distractor{k}": w for k, w in enumerate(wrong[i], 1)},
        )
        for i in range(n)
    ]


def mmlu(n):
    return [dict(question=f" {phrase(i)}?", choices=[phrase(i + k) for k in range(4)], answer=i % 4) for i in range(n)]


def write_rows(folder, **splits):
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """For every task, twelve rows to score and six to draw examples from; MMLU has two subjects here."""
    folder = tmp_path_factory.mktemp("data")
    for rows in (hellaswag, boolq, piqa, winogrande):
        write_rows(folder / rows.__name__, validation=rows(12), train=rows(18)[-6:])
    unlabelled = [r | dict(label="") for r in hellaswag(3)]
    write_rows(folder / "hellaswag", test=unlabelled)  # the hub has this split, the task does not read it
    for name, rows in (("arc_easy", arc), ("arc_challenge", arc), ("openbookqa", openbookqa), ("sciq", sciq)):
        write_rows(folder / name, test=rows(12), train=rows(18)[-6:])
    write_rows(folder / "mmlu_anatomy", test=mmlu(4), dev=mmlu(8)[-4:])
    write_rows(folder / "mmlu_virology", test=mmlu(12)[4:], dev=mmlu(8)[-4:])
    (folder / "two_subjects.yaml").write_text(
        """group: two_subjects
task: [mmlu_anatomy, mmlu_virology]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
    )
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
    more = [*more, "--include_path", str(data)]
    run.main([*map(str, models), "--data", str(data), "--out", str(out), "--device", "cpu", *tasks, *more])
    return {
        (s["checkpoint"], s["task"], s["shots"]): s for s in json.loads((out / "results.json").read_text())["scores"]
    }


@pytest.fixture(scope="module")
def scores(folders, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("scores")
    tasks = ["--tasks", *(t for t in PAPER if t != "mmlu"), "two_subjects"]
    return evaluate(folders, data, out, "--shots", "0", "2", "--published", "small", *tasks), out


def logp(model, prompt, continuation):
    ids = list((prompt + continuation).encode())
    with torch.no_grad():
        logs = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    n = len(continuation.encode())
    return logs[-n:].gather(1, torch.tensor(ids[-n:])[:, None]).sum().item()


def by_hand(model, items):
    """acc and acc_norm of (prompts, choices, gold) items; the norm is the number of characters of a choice."""
    plain = normed = 0
    for prompts, choices, gold in items:
        prompts = prompts if isinstance(prompts, list) else [prompts] * len(choices)
        found = [logp(model, p, " " + c) for p, c in zip(prompts, choices, strict=True)]
        plain += max(range(len(choices)), key=found.__getitem__) == gold
        normed += max(range(len(choices)), key=lambda i: found[i] / len(choices[i])) == gold
    return plain / len(items), normed / len(items)


def question_prompt(question):
    return f"Question: {question}\nAnswer:"


def subject(name, rows):
    start = f"The following are multiple choice questions (with answers) about {name}.\n\n"
    lines = [[r["question"].strip(), *(f"{x}. {c}" for x, c in zip("ABCD", r["choices"], strict=True))] for r in rows]
    return [
        (start + "\n".join([*line, "Answer:"]), list("ABCD"), r["answer"]) for line, r in zip(lines, rows, strict=True)
    ]


ITEMS = {
    "hellaswag": [
        (
            f"{r['activity_label']}: The {r['ctx_a'].split()[1]} is here. {r['ctx_b'].capitalize()}",
            r["endings"],
            int(r["label"]),
        )
        for r in hellaswag(12)
    ],
    "arc_easy": [(question_prompt(r["question"]), r["choices"]["text"], "ABCD".index(r["answerKey"])) for r in arc(12)],
    "boolq": [
        (f"{r['passage']}\n" + question_prompt(r["question"] + "?"), ["no", "yes"], r["label"]) for r in boolq(12)
    ],
    "openbookqa": [(r["question"], r["choices"]["text"], "ABCD".index(r["answerKey"])) for r in arc(12)],
    "piqa": [(question_prompt(r["goal"]), [r["sol1"], r["sol2"]], r["label"]) for r in piqa(12)],
    "winogrande": [
        ([r["sentence"].split(" _")[0] + " " + r[f"option{k}"] for k in (1, 2)], ["home."] * 2, int(r["answer"]) - 1)
        for r in winogrande(12)
    ],
    "sciq": [
        (
            r["support"].lstrip() + "\n" + question_prompt(r["question"]),
            [r["distractor1"], r["distractor2"], r["distractor3"], r["correct_answer"]],
            3,
        )
        for r in sciq(12)
    ],
    "two_subjects": subject("anatomy", mmlu(12)[:4]) + subject("virology", mmlu(12)[4:]),
}
ITEMS["arc_challenge"] = ITEMS["arc_easy"]


@pytest.mark.parametrize("task", ITEMS)
@pytest.mark.parametrize("number, name", [(0, "one"), (1, "two")])
def test_scores_equal_a_computation_by_hand(folders, scores, task, number, name):
    got = scores[0][name, task, 0]
    acc, acc_norm = by_hand(open_trained(folders[number], CPU).model, ITEMS[task])
    assert got["all_metrics"]["acc,none"] == pytest.approx(acc)
    assert got["metric"] == PAPER.get(task, ("", "acc"))[1]
    assert got["score"] == pytest.approx(acc if got["metric"] == "acc" else acc_norm)
    assert (got["documents"], got["shots"], got["prefix_token"]) == (12, 0, 256)
    p = got["score"]
    if task != "two_subjects":
        assert got["stderr"] == pytest.approx((p * (1 - p) / 11) ** 0.5)


def test_scores_differ_between_models_and_tasks(scores):
    assert len({s["score"] for s in scores[0].values()}) > 3


def test_a_checkpoint_and_its_export_give_the_same_numbers(scores):
    for (name, task, shots), score in scores[0].items():
        if name == "one":
            exported = scores[0]["hf", task, shots]
            for key in ("score", "stderr", "metric", "all_metrics", "documents", "tokenizer"):
                assert exported[key] == score[key], (task, shots, key)


def test_our_harness_model_agrees_with_that_of_lm_eval_on_an_export(folders):
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


def test_shots_are_examples_from_the_training_split(data):
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


def test_tables_have_every_model_and_the_published_rows(scores):
    text = (scores[1] / "table.md").read_text()
    assert "| model | shots | ARC-E acc_norm | ARC-C acc_norm | BoolQ acc | HellaSwag acc_norm |" in text
    assert "| WG acc | SciQ acc_norm | two_subjects acc | mean of 9 |" in text
    openai = "39.48 | 22.70 | 48.72 | 31.14 | 27.20 | 62.51 | 51.62 | 64.40 |  | 41.19 |"
    assert f"| published: OpenAI GPT-2 small, WebText | 0 | {openai}" in text
    assert "No published 2-shot scores of size small are known here." in text
    assert sum(line.startswith(("| one", "| two", "| hf")) for line in text.splitlines()) == 6
    rows = list(csv.DictReader((scores[1] / "table.csv").open()))
    row = next(r for r in rows if (r["model"], r["shots"]) == ("two", "0"))
    score = scores[0]["two", "boolq", 0]
    assert float(row["boolq"]) == pytest.approx(100 * score["score"], abs=1e-4)
    assert float(row["boolq_stderr"]) == pytest.approx(100 * score["stderr"], abs=1e-4)
    assert row["mean"] == ""


def test_an_interrupted_evaluation_continues_with_the_remaining_tasks(folders, data, tmp_path, monkeypatch):
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


def test_two_evaluations_at_once_with_one_folder_lose_no_score(folders, data, tmp_path):
    """Both start with an empty folder. The later tables show the tasks of both, and the command repeats nothing."""
    asked = {"two": ["winogrande", "piqa"], "one again": ["winogrande", "piqa"], "one": ["boolq", "piqa", "sciq"]}
    out, common = tmp_path / "scores", ["--task_data", str(data), "--include_path", str(data), "--device", "cpu"]
    lines = [[str(folders[k == "two"]), "--tasks", *tasks, "--out", str(out), *common] for k, tasks in asked.items()]
    command, pipes = [sys.executable, "-m", "eval.run", *lines.pop()], dict(stdout=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.STDOUT, **pipes)]
    for process in [*processes, *(Forked(run.main, line) for line in lines)]:
        finish(process)
    found = [(s["checkpoint"], s["task"]) for s in json.loads((out / "results.json").read_text())["scores"]]
    wanted = {("one", task) for task in asked["one"] + asked["one again"]} | {("two", task) for task in asked["two"]}
    assert sorted(found) == sorted(wanted)  # none twice, either
    before = (out / "results.json").read_bytes()
    run.main([str(folders[0]), "--tasks", "boolq", "--out", str(out), *common])
    assert (out / "results.json").read_bytes() == before
    text = (out / "table.md").read_text()
    assert "| PIQA acc_norm | WG acc | SciQ acc_norm |" in text  # what others have scored for this model
    assert "| two |" not in text
    assert sorted(p.name for p in out.iterdir()) == ["results.json", "table.csv", "table.md"]


def test_a_task_file_of_the_user_with_the_tokenizer_of_the_run(folders, tmp_path, capsys):
    (tmp_path / "tasks").mkdir()
    rows = [dict(q=phrase(i), a=[phrase(i + 1), phrase(i + 2)], gold=i % 2) for i in range(5)]
    (tmp_path / "tasks" / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "tasks" / "pairs.yaml").write_text(
        f"""task: my_pairs
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {tmp_path / "tasks" / "rows.jsonl"}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{q}}}}:"
doc_to_target: gold
doc_to_choice: "{{{{a}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}, {{metric: acc_norm}}]
"""
    )
    out = tmp_path / "tasks" / "scores"  # among the task files; what it holds is no change of the task

    def scores():
        run.main([str(folders[1]), "--tasks", "my_pairs", "--include_path", str(out.parent), "--out", str(out)])
        return json.loads((out / "results.json").read_text())["scores"]

    (score,) = scores()
    items = [(f"{r['q']}:", r["a"], r["gold"]) for r in rows]
    acc, acc_norm = by_hand(open_trained(folders[1], CPU).model, items)
    assert score["score"] == acc_norm
    assert (score["metric"], score["tokenizer"], score["harness"]) == ("acc_norm", "byte", "0.4.13")
    assert len(score["sha256"]) == 64
    text = capsys.readouterr().out  # no metric is chosen silently
    assert f"my_pairs, 0-shot  acc_norm {100 * acc_norm:.2f} +- " in text
    assert f", acc {100 * acc:.2f} +- " in text
    assert "| model | shots | my_pairs acc_norm | my_pairs acc | mean of 9 |" in text
    assert (out / "table.csv").read_text().startswith("model,shots,my_pairs,my_pairs_stderr,my_pairs_acc,my_pairs_acc_")
    assert scores() == [score]

    rows = [r | dict(gold=1 - r["gold"]) for r in rows]  # other answers are not the task that was scored
    (tmp_path / "tasks" / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert [s["score"] for s in scores()] == [score["score"], pytest.approx(1 - score["score"])]


def test_a_missing_dataset_is_explained_and_the_other_tasks_run(folders, data, tmp_path, capsys):
    few = tmp_path / "data"
    write_rows(few / "boolq", validation=boolq(3))
    with pytest.raises(SystemExit, match="1 of the tasks could not be run"):
        evaluate(folders[:1], few, tmp_path, "--tasks", "piqa", "boolq")
    error = capsys.readouterr().err
    line = next(line for line in error.splitlines() if "eval.run: task piqa" in line)
    for words in ("baber/piqa", "eval.fetch DIR --tasks piqa", "--task_data DIR", "piqa/{train,validation}.jsonl"):
        assert words in line
    assert "Traceback" not in error
    assert [s["task"] for s in json.loads((tmp_path / "results.json").read_text())["scores"]] == ["boolq"]


def test_every_task_of_the_papers_is_known_and_names_its_dataset(folders, tmp_path, capsys):
    with pytest.raises(SystemExit, match="9 of the tasks could not be run"):
        run.main([str(folders[0]), "--out", str(tmp_path), "--device", "cpu"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eval.run: task")]
    assert [line.split()[2].rstrip(":") for line in lines] == list(PAPER)
    assert all("is neither cached nor reachable" in line for line in lines)
    assert "mmlu_abstract_algebra/{test,dev}.jsonl and the same of 56 more" in lines[list(PAPER).index("mmlu")]


def test_examples_are_never_drawn_from_the_rows_that_are_scored(folders, tmp_path, capsys):
    few = tmp_path / "data"
    write_rows(few / "boolq", validation=boolq(3))
    with pytest.raises(SystemExit, match="1 of the tasks could not be run"):
        evaluate(folders[:1], few, tmp_path, "--tasks", "boolq", "--shots", "0", "5")
    assert "boolq/train.jsonl is missing, 5-shot needs it" in capsys.readouterr().err
    write_rows(few / "boolq", train=boolq(4))
    with pytest.raises(SystemExit, match="1 of the tasks could not be run"):
        evaluate(folders[:1], few, tmp_path, "--tasks", "boolq", "--shots", "0", "5")
    assert "eval.run: task boolq, 5-shot: lm-eval cannot run it (Sample larger" in capsys.readouterr().err


def test_two_processes_give_the_scores_of_one(folders, data, tmp_path):
    tasks = ["--tasks", "hellaswag", "two_subjects", "--shots", "2"]
    alone = evaluate(folders[:1], data, tmp_path / "one", *tasks)
    places = ["--data", str(data), "--include_path", str(data), "--out", str(tmp_path / "two")]
    printed = finish(Forked(run.main, [str(folders[0]), *tasks, *places, "--device", "cpu"], processes=2))
    assert printed.count("one  hellaswag, 2-shot") == 1
    for score in json.loads((tmp_path / "two" / "results.json").read_text())["scores"]:
        expected = alone["one", score["task"], 2]
        assert {k: v for k, v in score.items() if k != "seconds"} == {k: expected[k] for k in score if k != "seconds"}


def test_fetched_data_can_be_scored_without_a_network(folders, tmp_path, monkeypatch, capsys):
    requested, rows = [], {"train": piqa(6), "validation": piqa(12), "test": [dict(r, label=-1) for r in piqa(3)]}

    def hub(path, name, **options):
        requested.append((path, name))
        if path == "allenai/ai2_arc":
            raise ConnectionError("no route")
        return {split: datasets.Dataset.from_list(r) for split, r in rows.items()}

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", hub)
        for _ in range(2):
            fetch.main([str(tmp_path / "data"), "--tasks", "piqa"])
        with pytest.raises(SystemExit, match="task arc_easy: .*/ai2_arc: no route; the same command"):
            fetch.main([str(tmp_path / "data"), "--tasks", "arc_easy"])
    assert requested == [("baber/piqa", None), ("allenai/ai2_arc", "ARC-Easy")]
    assert sorted(p.name for p in (tmp_path / "data" / "piqa").iterdir()) == ["train.jsonl", "validation.jsonl"]
    assert "piqa: 2 files written\npiqa: 0 files written" in capsys.readouterr().out
    got = evaluate(folders[:1], tmp_path / "data", tmp_path, "--tasks", "piqa")["one", "piqa", 0]
    assert got["score"] == by_hand(open_trained(folders[0], CPU).model, ITEMS["piqa"])[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--include_path", "nowhere"], "--include_path nowhere: no such folder"),
        (["--task_data", "nowhere"], "--task_data nowhere: no such folder"),
        (["--shots", "-1"], "argument --shots: -1: must be at least 0"),
        (["--limit", "0"], "argument --limit: 0: must be at least 1"),
    ],
)
def test_bad_arguments_are_one_clear_line(folders, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message) as error:
        run.main([str(folders[0]), "--out", str(tmp_path / "out"), *arguments])
    assert "\n" not in str(error.value)


OWN_TASK = """task: own
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_target: gold
doc_to_choice: "{{a}}"
"""


@pytest.mark.parametrize(
    "yaml, rows, message",
    [
        ("task: [", b"", 'unknown task "own"; .*broken.yaml cannot be read .*while parsing'),
        ("task: own\noutput_type: multiple_choice\n", b"", "task own: "),
        ("task: own\ndataset_path: json\noutput_type: sing\n", b"", "task own: "),
        (OWN_TASK, b"\xff\xfe{}", "task own: its data could not be read"),
        (OWN_TASK, b"[[[[", "task own: its data could not be read"),
        (OWN_TASK, b'{"other": 1}\n', "task own: its data could not be read"),
    ],
)
def test_broken_task_files_are_one_clear_line(folders, tmp_path, capsys, yaml, rows, message):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_bytes(rows)
    (tasks / "broken.yaml").write_text(yaml.replace("FILE", str(tasks / "rows.jsonl")))
    with pytest.raises(SystemExit) as error:
        run.main([str(folders[0]), "--tasks", "own", "--include_path", str(tasks), "--out", str(tmp_path / "out")])
    lines = [*capsys.readouterr().err.splitlines(), str(error.value)]
    (line,) = [line for line in lines if re.search(message, line)]
    assert line.startswith("eval.run: ")


def test_an_unknown_task_is_one_clear_line(monkeypatch):
    """The list of all tasks is replaced by a short one: reading thousands of task files takes half a minute."""
    folder = Path(lm_eval_tasks.__file__).parent / "hellaswag"
    few_tasks = lm_eval_tasks.TaskManager(include_defaults=False, include_path=[folder])
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", lambda **options: few_tasks)
    with pytest.raises(ValueError, match='unknown task "hellaswagg"; nearest: hellaswag'):
        Tasks(["hellaswagg"])


def test_another_file_as_results_and_a_missing_model_are_errors(folders, tmp_path):
    odd = [
        "[1, 2]",
        "[" * 100_000,
        '{"scores": 5}',
        '{"scores": [[1]]}',
        '{"scores": [{"task": 1}]}',
        "\xff",
        '{"scores": null}',
    ]
    for content in odd:
        (tmp_path / "results.json").write_text(content, encoding="latin-1")
        with pytest.raises(SystemExit, match="results.json: not a results file; repair it or choose another --out"):
            run.main([str(folders[0]), "--tasks", "boolq", "--out", str(tmp_path)])
        assert (tmp_path / "results.json").read_text(encoding="latin-1") == content
    with pytest.raises(SystemExit, match="results.json: File exists"):
        run.main([str(folders[0]), "--tasks", "boolq", "--out", str(tmp_path / "results.json")])
    with pytest.raises(SystemExit, match="neither a checkpoint"):
        run.main([str(tmp_path / "nothing"), "--tasks", "boolq", "--out", str(tmp_path / "out")])


def test_scores_go_to_the_runs_wandb_page(folders, data, tmp_path, monkeypatch, capsys):
    folder = byte_run(tmp_path, tmp_path / "gone", name="watched", block_size=512)
    (folder / "wandb_id").write_text("abc123")
    checkpoint = folder / "checkpoints" / "step_0000030"
    config = json.loads((checkpoint / "state.json").read_text())["config"]
    change_state(checkpoint, config=config | {"log": config["log"] | {"wandb": "online"}})
    page = types.SimpleNamespace(summary={}, finish=lambda: None)
    settings = {}
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **k: settings.update(k) or page))
    score = evaluate([folder], data, tmp_path / "out", "--tasks", "boolq")["watched", "boolq", 0]
    assert (settings["id"], settings["resume"]) == ("abc123", "must")
    assert page.summary == {"eval/boolq/0-shot/acc": score["score"]}

    def outage(**settings):
        raise OSError("no route")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=outage))
    evaluate([folder], data, tmp_path / "out2", "--tasks", "boolq")
    assert "wandb did not take the scores (no route); results.json has them" in capsys.readouterr().out
    page.summary.clear()
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **k: page))
    evaluate(
        [folder], data, tmp_path / "out2", "--tasks", "boolq"
    )  # all tasks are scored, but the page is not written yet
    assert page.summary == {"eval/boolq/0-shot/acc": score["score"]}


def test_scores_of_an_offline_run_are_written_after_it_is_synced(folders, data, tmp_path, monkeypatch, capsys):
    folder = byte_run(tmp_path, tmp_path / "gone", name="watched", block_size=512)
    (folder / "wandb_id").write_text("abc123")
    page = types.SimpleNamespace(summary={}, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **k: page))
    evaluate([folder], data, tmp_path / "out", "--tasks", "boolq")
    assert "wandb run abc123 is offline" in capsys.readouterr().out
    assert page.summary == {}
    evaluate([folder], data, tmp_path / "out", "--tasks", "boolq", "--wandb", "on")
    assert list(page.summary) == ["eval/boolq/0-shot/acc"]


def test_the_mean_of_published_rows_and_the_sizes():
    row = next(r for r in published()["downstream"] if r["method"] == "MARS-AdamW" and r["size"] == "xl")
    scores = [dict(checkpoint="x", task=t, shots=0, metric=PAPER[t][1], score=0.5, stderr=None) for t in PAPER]
    assert f"{sum(row['scores'].values()) / 9:.2f} |" in markdown(scores, ["xl"])
    assert "| x | 0 |" + " 50.00 |" * 10 in markdown(scores, ["xl"])
    assert "Published: MARS paper" in markdown(scores, ["xl"])
    assert "OpenAI GPT-2 small" in markdown(scores, ["small", "xl"])
    assert "ublished" not in markdown(scores, [])
    five = markdown([s | dict(shots=5) for s in scores], ["small"])
    assert "| published: Muon small, OpenWebText | 5 |" + "  |" * 9 + " 41.55 |" in five
    assert "Of AdamW, Lion, Muon, MARS-Lion (small, 5-shot) only the mean is known here." in five
    assert [size_of(n) for n in (124_000_000, 353_000_000, 1_557_000_000, 3_000_000)] == ["small", "medium", "xl", None]
    assert metric_of("other", {"acc,none": 1, "acc_norm,none": 1, "acc_stderr,none": 1}) == "acc_norm"
    assert metric_of("other", {"alias": "x", "bpb,none": 1, "bpb_stderr,none": 1}) == "bpb"


def test_the_table_lists_cut_requests():
    score = dict(checkpoint="run", task="boolq", shots=5, metric="acc", score=0.5, stderr=None, requests=24)
    whole = markdown([score | dict(requests_cut_on_the_left=0)], [])
    assert "Requests" not in whole
    text = markdown([score | dict(requests_cut_on_the_left=3), score | dict(task="piqa", metric="acc_norm")], [])
    assert text.endswith(
        "Requests longer than the context, without their first tokens:\n\n- run, 5-shot: boolq 3 of 24\n"
    )


def test_other_weights_or_fewer_documents_get_separate_rows():
    score = dict(checkpoint="run", task="boolq", shots=0, metric="acc", score=0.5, stderr=None, limit=None)
    score |= dict(sha256="a", step=10)
    assert "| run | 0 | 50.00 |" in markdown([score], [])
    later = score | dict(sha256="b", step=20, score=0.75)
    some = score | dict(limit=7, score=0.25)
    lines = markdown([score, later | dict(task="piqa", metric="acc_norm"), later, some], []).splitlines()[2:]
    assert lines == [
        "| run, step 10 | 0 | 50.00 |  |  |",
        "| run, step 20 | 0 | 75.00 | 75.00 |  |",
        "| run, first 7 documents | 0 | 25.00 |  |  |",
    ]


def test_too_little_memory_and_an_interruption_are_one_line():
    for error, message in (
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "x: out of memory; use a smaller model .*CUDA"),
        (MemoryError(), "x: out of memory; use a smaller model"),
        (KeyboardInterrupt(), "x: interrupted"),
    ):
        with pytest.raises(SystemExit, match=message) as found, one_line("x"):
            raise error
        assert "\n" not in str(found.value)
    with pytest.raises(RuntimeError, match="an error"), one_line("x"):
        raise RuntimeError("an error")


def test_without_lm_eval_the_error_names_the_package(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match="benchmark scores need: pip install lm_eval"):
        run.main([str(folders[0]), "--tasks", "boolq", "--out", str(tmp_path)])
