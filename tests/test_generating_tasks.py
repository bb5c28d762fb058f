"""Tasks of lm-eval that generate text or score whole texts, and real questions of MMLU, all offline."""

import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from small_runs import byte_run, phrase, small_model
from test_eval_run import write_rows

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

from data.tokenizer import ByteTokenizer
from eval import run
from eval.sample import generate
from eval.scoring import Scorer, greedy, harness_model
from eval.tasks import factor, metric_of
from weights import open_trained

CPU = torch.device("cpu")
EOT = 256


def one_by_one(model, prompt, count):
    return list(generate(model, prompt, count, temperature=0))


@pytest.fixture(scope="module")
def model():
    return small_model(2)


@pytest.mark.parametrize("lengths", [[9] * 5, [9, 1, 30, 17, 30], [40]])
def test_a_batch_gives_the_text_of_each_prompt_alone(model, lengths):
    """Also for a prompt and new tokens that fill the whole context."""
    chance = random.Random(0)
    prompts = [[chance.randrange(257) for _ in range(n)] for n in lengths]
    new = greedy(model, prompts, 64 - max(lengths))
    for prompt, ids in zip(prompts, new, strict=True):
        assert ids == one_by_one(model, prompt, 64 - max(lengths))


def test_hidden_states_of_a_padded_batch_are_those_of_its_rows(model):
    from model import KVCache

    rows, cache = [[5, 6, 7, 8], [9, 10]], KVCache(torch.tensor([0, 2]))
    with torch.no_grad():
        hidden = model.hidden(torch.tensor([rows[0], [0, 0, *rows[1]]]), cache)
        for number, row in enumerate(rows):
            torch.testing.assert_close(hidden[number, -len(row) :], model.hidden(torch.tensor([row]))[0])


def requests_for(prompts, **settings):
    from lm_eval.api.instance import Instance

    return [Instance("generate_until", {}, (prompt, dict(settings)), i) for i, prompt in enumerate(prompts)]


def text_after(model, prompt, count, stops=()):
    """The text that the harness expects, from whole tokens one by one."""
    ids = one_by_one(model, list(prompt.encode()), count)
    text = ByteTokenizer().decode(ids[: ids.index(EOT)] if EOT in ids else ids)
    return text[: min([text.index(stop) for stop in stops if stop in text], default=len(text))]


@pytest.mark.parametrize("batch_tokens", [1, 70, 8192])
def test_texts_end_at_a_stop_string_or_after_the_tasks_number_of_tokens(model, batch_tokens):
    prompts = [phrase(i, *range(i % 4)) for i in range(9)]
    whole = [text_after(model, prompt, 20) for prompt in prompts]
    harness = harness_model(Scorer(model, batch_tokens), ByteTokenizer())
    assert harness.generate_until(requests_for(prompts, until=[], max_gen_toks=20), True) == whole
    stops = [whole[0][3:5], whole[4][6]]
    expected = [text_after(model, prompt, 20, stops) for prompt in prompts]
    assert expected != whole
    assert harness.generate_until(requests_for(prompts, until=stops, max_gen_toks=20), True) == expected
    both = requests_for(prompts[:2], until=stops, max_gen_toks=20) + requests_for(prompts[2:], until="", max_gen_toks=4)
    mixed = [*expected[:2], *(text_after(model, prompt, 4) for prompt in prompts[2:])]
    assert harness.generate_until(both, True) == mixed


def test_end_of_text_ends_a_text_and_is_no_part_of_it(model):
    ids = one_by_one(model, list(b"river"), 20)
    place = max(i for i in range(20) if ids[i] not in ids[:i])
    assert place > 0

    class Ends(ByteTokenizer):
        stop = ids[place]

    text = harness_model(Scorer(model), Ends()).generate_until(requests_for(["river"], max_gen_toks=20), True)[0]
    assert text == ByteTokenizer().decode(ids[:place])


def test_a_long_prompt_is_cut_on_the_left_and_counted(model):
    scorer = Scorer(model)
    text = phrase(*range(40))
    found = harness_model(scorer, ByteTokenizer()).generate_until(requests_for([text, "a"], max_gen_toks=20), True)
    assert found[0] == text_after(model, text[-44:], 20)
    assert (scorer.truncated, scorer.scored) == (1, 2)
    with pytest.raises(ValueError, match="64 new tokens and a prompt do not fit in the context of 64"):
        harness_model(scorer, ByteTokenizer()).generate_until(requests_for([text], max_gen_toks=64), True)
    with pytest.raises(ValueError, match="only tasks with do_sample: false can be run"):
        harness_model(scorer, ByteTokenizer()).generate_until(requests_for([text], do_sample=True), True)


def test_our_texts_are_those_of_lm_evals_own_model(tmp_path):
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    from eval import export

    folder = byte_run(tmp_path, tmp_path / "gone", 2)
    export.main([str(folder), str(tmp_path / "hf")])
    theirs = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=4)
    prompts = [phrase(i, *range(i)) for i in range(6)]  # the longer ones are cut
    trained = open_trained(folder, CPU)
    requests = requests_for(prompts, until=["\n", "e"], max_gen_toks=24, do_sample=False)
    ours = harness_model(Scorer(trained.model), trained.tokenizer).generate_until(requests, True)
    assert ours == theirs.generate_until(requests, True)


# ---- whole tasks through eval.run

GENERATION = """task: my_answers
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
output_type: generate_until
validation_split: validation
doc_to_text: "{{{{q}}}}:"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["{stop}"], max_gen_toks: 8, do_sample: false}}
filter_list: [{{name: first, filter: [{{function: take_first}}]}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def test_a_generating_task_is_scored(tmp_path, capsys):
    folder = byte_run(tmp_path, tmp_path / "gone", 2)
    model = open_trained(folder, CPU).model
    questions = [phrase(i, *range(i % 3)) for i in range(8)]
    answers = [text_after(model, f"{q}:", 8, ["e"]) for q in questions]
    rows = [dict(q=q, a=a if i % 4 else "never") for i, (q, a) in enumerate(zip(questions, answers, strict=True))]
    write_rows(tmp_path / "tasks", rows=rows)
    content = GENERATION.format(rows=tmp_path / "tasks" / "rows.jsonl", stop="e")
    (tmp_path / "tasks" / "answers.yaml").write_text(content)
    arguments = ["--tasks", "my_answers", "--include_path", str(tmp_path / "tasks"), "--out", str(tmp_path)]
    run.main([str(folder), *arguments, "--device", "cpu"])
    score = json.loads((tmp_path / "results.json").read_text())["scores"][0]
    assert (score["score"], score["metric"], score["documents"]) == (0.75, "exact_match,first", 8)
    assert score["stderr"] == pytest.approx((0.75 * 0.25 / 7) ** 0.5)
    assert "my_answers, 0-shot  exact_match,first 75.00" in capsys.readouterr().out


def test_wikitext_gives_the_perplexity_per_word_of_whole_pages(tmp_path, capsys):
    folder = byte_run(tmp_path, tmp_path / "gone", 2)
    pages = [phrase(*range(40)), "One short page . Another line .", phrase(3, 1, 4)]
    splits = {split: [dict(page=page) for page in pages] for split in ("test", "validation", "train")}
    write_rows(tmp_path / "data" / "wikitext", **splits)
    arguments = ["--tasks", "wikitext", "--task_data", str(tmp_path / "data"), "--out", str(tmp_path)]
    run.main([str(folder), *arguments, "--device", "cpu"])
    score = json.loads((tmp_path / "results.json").read_text())["scores"][0]
    model, total, words = open_trained(folder, CPU).model, 0.0, 0
    for page in pages:  # disjoint windows, each with one token of context, the last one with more
        words += len(page.split())
        page = page.replace(" . ", ". ")  # the task's detokenizer
        ids = [EOT, *page.encode()]
        with torch.no_grad():
            for first in range(1, len(ids), 64):
                targets = ids[first : first + 64]
                window = ids[max(0, first + len(targets) - 65) : first + len(targets)]
                logs = model(torch.tensor([window[:-1]]))[0].double().log_softmax(-1)
                total += logs[torch.arange(-len(targets), 0), torch.tensor(targets)].sum().item()
    assert score["metric"] == "word_perplexity"
    assert score["score"] == pytest.approx(math.exp(-total / words), rel=1e-3)
    assert f"word_perplexity {score['score']:.2f}" in capsys.readouterr().out  # no percent


def test_a_metric_of_filtered_answers_keeps_its_filter_and_perplexities_are_no_percent():
    assert (
        metric_of("x", {"alias": "x", "exact_match,strict": 1, "exact_match_stderr,strict": 1}) == "exact_match,strict"
    )
    assert metric_of("x", {"f1,none": 1, "exact_match,strict": 1}) == "f1"
    assert [factor(m) for m in ("acc", "exact_match,strict", "word_perplexity", "bits_per_byte")] == [100, 100, 1, 1]


# ---- the real questions of MMLU that lm-eval brings, as examples of one of its own tasks

QUESTION = re.compile(r"(.*?)\n\(A\) (.*)\s\(B\) (.*)\s\(C\) (.*)\s\(D\) (.*)", re.DOTALL)


def mmlu_questions():
    """Rows in MMLU's format by subject."""
    import lm_eval
    import yaml

    folder, out = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "flan_cot_fewshot", {}
    for path in sorted(folder.glob("mmlu_*.yaml")):
        samples = yaml.safe_load(path.read_text(encoding="utf-8"))["fewshot_config"]["samples"]
        for sample in samples:
            match, right = (
                QUESTION.fullmatch(sample["question"].strip()),
                re.search(r"is \(([A-D])\)", sample["target"]),
            )
            if match and right:
                question, *choices = match.groups()
                row = dict(question=question, choices=choices, answer="ABCD".index(right[1]))
                out.setdefault(path.stem, []).append(row)
    return out


def test_real_questions_of_mmlu_are_scored_with_the_harness_prompt(tmp_path, monkeypatch):
    subjects = mmlu_questions()
    assert len(subjects) == 57
    expected = []  # prompts and right answers
    for name, rows in subjects.items():
        write_rows(tmp_path / "data" / name, test=rows, dev=rows)
        topic = name.removeprefix("mmlu_").replace("_", " ")
        start = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
        for row in rows:
            lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True)]
            expected.append((start + "\n".join([row["question"].strip(), *lines, "Answer:"]), row["answer"]))
    assert len(expected) >= 275
    found, real = {}, Scorer.loglikelihoods

    def recorded(scorer, pairs, progress=False):
        scores = real(scorer, pairs, progress)
        for (context, continuation), (logp, _) in zip(pairs, scores, strict=True):
            found.setdefault(bytes(context).decode(), {})[bytes(continuation).decode()] = logp
        return scores

    monkeypatch.setattr(Scorer, "loglikelihoods", recorded)
    folder = byte_run(tmp_path, tmp_path / "gone", 2, block_size=1024)
    run.main([str(folder), "--tasks", "mmlu", "--task_data", str(tmp_path / "data"), "--out", str(tmp_path)])
    assert found.keys() == {prompt for prompt, _ in expected}
    right = 0
    for prompt, answer in expected:
        scores = found[prompt]
        assert list(scores) == [" A", " B", " C", " D"]
        assert all(math.isfinite(logp) and logp < 0 for logp in scores.values())
        right += max(range(4), key=list(scores.values()).__getitem__) == answer
    score = json.loads((tmp_path / "results.json").read_text())["scores"][0]
    assert (score["documents"], score["metric"]) == (len(expected), "acc")
    assert score["score"] == pytest.approx(right / len(expected))
