"""HellaSwag items scored during training: by the harness's rules, on any number of ranks."""

import json

import pytest
import torch
from conftest import CONFIG, finish, launch
from small_runs import byte_dataset, hellaswag, small_model

import train_gpt
from data.hellaswag import count_right, plain, read_items
from data.shards import DataError
from data.tokenizer import ByteTokenizer
from eval import run as eval_run
from training.logger import read_metrics


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A dataset, and HellaSwag rows where --data of eval.run finds them."""
    folder = tmp_path_factory.mktemp("hellaswag")
    byte_dataset(folder / "tokens")
    (folder / "hellaswag").mkdir()
    (folder / "hellaswag" / "validation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in hellaswag(30)))
    return folder


def arguments(root, folder, *more):
    out = [str(CONFIG), f"--data.path={root / 'tokens'}", f"--log.folder={folder}", "--name=run", "--vocab_size=257"]
    return [*out, "--steps=6", "--eval_every=1", "--block_size=256", *more]


def scored(folder, metric="acc_norm"):
    records = read_metrics(folder / "run" / "metrics.jsonl")
    return {r["step"]: r[f"hellaswag_{metric}"] for r in records if f"hellaswag_{metric}" in r}


def test_training_logs_what_the_harness_gives_for_its_checkpoint(root, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    options = [f"--data.hellaswag={root / 'hellaswag' / 'validation.jsonl'}", "--data.hellaswag_every=4"]
    train_gpt.main(arguments(root, tmp_path, *options))
    assert "30 HellaSwag items" in capsys.readouterr().out
    found = scored(tmp_path)
    assert list(found) == [4, 6]  # every fourth evaluation and the last
    command = [str(tmp_path / "run"), "--tasks", "hellaswag", "--data", str(root), "--out", str(tmp_path / "scores")]
    eval_run.main([*command, "--device", "cpu"])
    score = json.loads((tmp_path / "scores" / "results.json").read_text())["scores"][0]
    assert (score["metric"], score["documents"]) == ("acc_norm", 30)
    assert found[6] == pytest.approx(score["score"])
    assert scored(tmp_path, "acc")[6] == pytest.approx(score["all_metrics"]["acc,none"])
    assert set(scored(tmp_path, "items").values()) == {30}


def test_it_is_off_by_default_and_changes_nothing_else(root, tmp_path):
    train_gpt.main(arguments(root, tmp_path / "off"))
    options = [f"--data.hellaswag={root / 'hellaswag' / 'validation.jsonl'}", "--data.hellaswag_every=1"]
    train_gpt.main(arguments(root, tmp_path / "on", *options))
    assert scored(tmp_path / "off") == {}
    assert len(scored(tmp_path / "on")) == 6
    losses = [
        [r["loss"] for r in read_metrics(tmp_path / name / "run" / "metrics.jsonl") if "loss" in r]
        for name in ("on", "off")
    ]
    assert losses[0] == losses[1]


def test_two_processes_score_what_one_scores(root, tmp_path):
    options = [f"--data.hellaswag={root / 'hellaswag' / 'validation.jsonl'}", "--data.hellaswag_items=7", "--steps=1"]
    options += ["--schedule.warmup=0", "--dropout=0"]
    train_gpt.main(arguments(root, tmp_path / "one", *options))
    finish(launch(arguments(root, tmp_path / "two", *options), processes=2))
    for metric, values in (("acc_norm", None), ("acc", None), ("items", {1: 7})):
        one, two = scored(tmp_path / "one", metric), scored(tmp_path / "two", metric)
        assert one == two == (values or one) != {}


def test_the_ending_likeliest_per_character_counts_for_acc_norm_and_the_likeliest_for_acc(root):
    items = read_items(str(root / "hellaswag" / "validation.jsonl"), 100, ByteTokenizer())
    model, right = small_model(), [0, 0]
    for item in items:
        sums = []
        for ending in item.endings:
            ids = (item.context + ending)[-65:]
            with torch.no_grad():
                logp = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
            n = min(len(ending), len(ids) - 1)
            sums.append(logp[-n:].gather(1, torch.tensor(ids[-n:])[:, None]).sum().item())
        right[0] += max(range(4), key=lambda i: sums[i] / item.characters[i]) == item.right
        right[1] += max(range(4), key=sums.__getitem__) == item.right
    assert count_right(model, items, torch.device("cpu")).tolist() == right
    assert 0 < right[0] != right[1] < 30


def test_marks_in_brackets_are_removed():
    assert plain(" Bake [title] Mix [substeps] it. [step] Stir.") == "Bake. Mix it. Stir."


def test_the_same_items_are_drawn_in_the_same_mixed_order(root):
    path = str(root / "hellaswag" / "validation.jsonl")
    every, some = read_items(path, 300, ByteTokenizer()), read_items(path, 10, ByteTokenizer())
    assert some == read_items(path, 10, ByteTokenizer())
    assert (len(every), len(some)) == (30, 10)
    assert all(item in every for item in some)
    in_file = [json.loads(line)["activity_label"] for line in (root / "hellaswag" / "validation.jsonl").open()]
    assert [bytes(i.context).decode().split(":")[0] for i in every] != in_file


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read"),
        ("", "holds no rows"),
        ('{"query": "x"}\n', "line 1 is not a HellaSwag row .KeyError"),
        (json.dumps(hellaswag(1)[0] | {"label": "7"}) + "\n", "line 1 is not a HellaSwag row .IndexError"),
        ("not json\n", "line 1 is not a HellaSwag row .JSONDecodeError"),
    ],
)
def test_a_file_of_something_else_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        read_items(str(path), 5, ByteTokenizer())
    assert "\n" not in str(error.value)
