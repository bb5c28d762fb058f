"""The page that scripts/report.py makes from run folders and results."""

import json
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
from conftest import CONFIG, ROOT, environment
from small_runs import byte_dataset, byte_run

import train_gpt
from eval import expected
from eval.report_html import sample
from eval.table import published
from model import GPT, GPTConfig
from scripts import report
from scripts.report import method_of, on_track, published_loss, read_run

SMALL = asdict(GPTConfig(n_layer=12, n_head=12, n_embd=768, vocab_size=50257))


def run_folder(folder, losses, optimizer="adamw", data="data/tokens/openwebtext", model=SMALL, steps=100_000, **optim):
    """losses: tokens to validation loss; 1,000 tokens a second and 10 a gradient evaluation."""
    folder.mkdir(parents=True)
    config = dict(model=model, data=dict(path=data), optimizer=optimizer, optim=optim, steps=steps, batch_size=480)
    (folder / "config.json").write_text(json.dumps(config))
    records = []
    for step, (tokens, loss) in enumerate((int(t), x) for t, x in losses.items()):
        train = dict(step=step, tokens=tokens, loss=loss + 0.1, train_s=tokens / 1000, gradient_evaluations=tokens / 10)
        records += [train | dict(mfu=0.41), dict(step=step, tokens=tokens, val_loss=loss)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


@pytest.mark.parametrize("loss, verdict", [(3.03, "inside"), (2.90, "below"), (3.10, "above"), (3.053, "inside")])
def test_on_track_at_a_published_count(tmp_path, loss, verdict, capsys):
    run_folder(tmp_path / "a", {1e9: 3.6, 20e9: loss})
    report.main(["--on-track", str(tmp_path / "a")])
    line = capsys.readouterr().out
    assert f"openwebtext: {verdict} the band at 20B tokens: best loss" in line
    assert "a: AdamW, small, openwebtext" in line
    assert line.endswith(": docs/expected_loss.md\n")
    assert f"20B tokens: best loss {loss:.3f}, published 3.024 +- 0.03" in line


def test_a_different_token_budget_is_reported(tmp_path):
    same = run_folder(tmp_path / "same", {20e9: 3.03})
    short = run_folder(tmp_path / "short", {20e9: 2.9}, steps=40_690)
    assert "budget" not in on_track(read_run(same))
    assert "its budget is 20B tokens, the published 49.2B" in on_track(read_run(short))
    assert report.budget_of(dict(tokens=None, steps=3, batch_size=None, batch_tokens=64)) == 192
    assert report.budget_of(dict(tokens=500, steps=None)) == 500


def test_published_losses_are_interpolated_between_counts_and_never_extrapolated(tmp_path):
    run = read_run(run_folder(tmp_path / "a", {1e9: 3.6}))
    assert published_loss(run, 5e9) == 3.193
    assert published_loss(run, 10e9) == pytest.approx((3.193 + 3.024) / 2)  # halfway from 5 to 20 on a log scale
    assert published_loss(run, 4e9) is None
    assert published_loss(run, 60e9) is None
    only_end = read_run(run_folder(tmp_path / "b", {1e9: 3.6}, "mars_m", gamma=0.025))
    assert published_loss(only_end, 49.152e9) == 2.841
    assert published_loss(only_end, 40e9) is None


def test_a_run_without_published_numbers_is_reported(tmp_path):
    tiny = asdict(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=257))
    line = on_track(read_run(run_folder(tmp_path / "a", {1e9: 3.6}, data="tokens/pydocs", model=tiny)))
    parameters = GPT(GPTConfig(**tiny)).num_params()
    assert f"AdamW, {parameters:,} parameters, pydocs: nothing published to compare with" in line


@pytest.mark.parametrize(
    "optimizer, optim, method",
    [
        ("adamw", {}, "AdamW"),
        ("muon", dict(scale="moonlight"), "Moonlight"),
        ("muon_original", dict(scale="original"), "Muon"),
        ("mars", dict(mars_type="mars-adamw", is_approx=True), "MARS-AdamW"),
        ("mars", dict(mars_type="mars-adamw", is_approx=False), "MARS-AdamW exact"),
        ("mars_m", dict(gamma=0.01, is_approx=True), "MARS-M gamma 0.01"),
        ("lion", {}, "Lion"),
    ],
)
def test_methods_have_their_published_names(optimizer, optim, method):
    assert method_of(dict(optimizer=optimizer, optim=optim)) == method


def test_the_page_has_losses_pairs_and_scores(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = [
        run_folder(tmp_path / "base", {1e9: 3.6, 4e9: 3.3, 8e9: 3.1, 20e9: 3.03}),
        run_folder(tmp_path / "ours", {1e9: 3.5, 4e9: 3.2, 8e9: 3.0}, "mars", mars_type="mars-adamw"),
    ]
    paired = dict(text="val", context=1024, models=[], paired=[])
    paired["models"] = [
        dict(name=n, loss=x, stderr=0.02, targets=10, windows=2) for n, x in (("base", 3.1), ("ours", 3))
    ]
    paired["paired"] = [dict(a="base", b="ours", difference=-0.1, stderr=0.01, interval95=[-0.12, -0.08])]
    (tmp_path / "paired.json").write_text(json.dumps(paired))
    scores = [dict(checkpoint="ours", task="boolq", shots=0, metric="acc", score=0.5, stderr=0.01)]
    (tmp_path / "results.json").write_text(json.dumps(dict(scores=scores)))
    more = ["--paired", str(tmp_path / "paired.json"), "--scores", str(tmp_path / "results.json")]
    report.main([*map(str, runs), "--out", str(tmp_path / "out"), *more])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| openwebtext | 20,000,000,000 | 3.0300 | 3.0300 | 5555.56 | 41.0% |" in text
    assert "| run | 2B | 4B | 5B | 6B | 8B | 20B |" in text
    base = next(line for line in text.splitlines() if line.startswith("| base | 3."))
    assert base.split(" | ")[3:] == ["3.3000 (3.193)", *base.split(" | ")[4:6], "3.0300 (3.024) |"]
    ours = next(line for line in text.splitlines() if line.startswith("| ours | 3."))
    assert "3.2000 (3.108)" in ours
    assert ours.endswith(" | (2.981) |")
    assert "- ours - base  -0.1000 nats/token, 95 % interval -0.1200 to -0.0800: ours is better" in text
    assert "| ours | 0 | 50.00 +- 1.00 |  |" in text
    assert "published: OpenAI GPT-2 small, WebText | 0 | 48.72" in text
    assert (tmp_path / "out" / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_published_rows_are_complete_and_name_their_sources():
    for row in published()["downstream"]:
        assert len(row["scores"]) == 9 or (row["scores"] == {} and 20 < row["mean"] < 90)
        assert all(20 < s < 90 for s in row["scores"].values())
    numbers = published()
    read = {r["source"] for key in ("losses", "curves") for r in numbers[key]}
    assert read == set(numbers["reading_error"])
    assert read | {"downstream"} == set(numbers["sources"])


def test_the_page_of_expected_losses_is_what_its_command_writes():
    text = expected.page()
    assert text == (ROOT / expected.PAGE).read_text()
    assert "| small | AdamW |  |  | 3.193 |  |  | 2.885 | MARS README |" in text  # lowest, as published
    assert "| small | Muon |  | 3.287* | 3.159* | 3.051* | 2.977* | 2.920* | MARS README curve |" in text
    assert "| medium | MARS-M |  |  |  |  | 2.933* | 2.627 | MARS-M plot |" in text
    arms = {(r["size"], r["method"]) for r in published()["losses"]}
    assert all(f"| {size} | {method} |" in text for size, method in arms)


def test_published_curves_fall_and_end_above_the_published_minimum():
    """No height of a curve may be below the lowest loss of the same run, beyond the reading errors."""
    numbers = published()
    errors, ends = numbers["reading_error"], {}
    for p in numbers["losses"]:
        if p["source"] == "MARS-M plot" and p["kind"] == "best":
            ends[p["size"], p["data"], p["method"]] = p["loss"]
    curves: dict = {}
    for c in numbers["curves"]:
        curves.setdefault((c["source"], c["size"], c["data"], c["method"]), []).append((c["tokens"], c["loss"]))
    for (source, *arm), points in curves.items():
        losses = [loss for _, loss in sorted(points)]
        assert losses == sorted(losses, reverse=True)
        if source == "MARS-M curve":
            assert losses[-1] > ends[tuple(arm)] - errors[source]


@pytest.mark.parametrize("path", ["openwebtext", "owt_1B", "OpenWebText-2"])
def test_a_corpus_is_known_by_the_name_of_its_folder(tmp_path, path):
    assert read_run(run_folder(tmp_path / "a", {1e9: 3.6}, data=f"data/{path}")).data == "openwebtext"


def test_other_corpora_are_not_compared_with_published_losses(tmp_path):
    names = {"fineweb_edu_100B": "fineweb-edu", "fineweb_10B": "fineweb_10b", "growth": "growth", "owts": "owts"}
    for path, name in names.items():
        assert read_run(run_folder(tmp_path / path, {1e9: 3.6}, data=f"data/{path}")).data == name


@pytest.mark.parametrize("break_it", ["config", "metrics", "torn", "no evaluation", "vision"])
def test_a_folder_that_is_no_run_is_one_clear_line(tmp_path, break_it):
    folder = run_folder(tmp_path / "a", {1e9: 3.6})
    messages = {
        "config": "no config.json",
        "metrics": "no metrics.jsonl",
        "torn": "not readable as JSON",
        "vision": "not a run of train_gpt.py",
    }
    if break_it in ("config", "metrics"):
        next(folder.glob(f"{break_it}*")).unlink()
    elif break_it == "torn":
        (folder / "config.json").write_text("{")
    elif break_it == "vision":  # a run of experiments.vision
        (folder / "metrics.jsonl").write_text('{"step": 4, "epoch": 1, "val_loss": 0.5}\n')
    else:
        (folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 5, "loss": 3}\n')
    with pytest.raises(SystemExit, match=messages.get(break_it, "no evaluation in metrics.jsonl yet")) as error:
        report.main([str(folder), "--out", str(tmp_path / "out")])
    assert "\n" not in str(error.value)


def test_files_without_results_are_one_clear_line(tmp_path):
    folder = run_folder(tmp_path / "a", {1e9: 3.6})
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(SystemExit, match=r"x.json: not a results.json of eval.run"):
        report.main([str(folder), "--scores", str(tmp_path / "x.json"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="name at least one run folder"):
        report.main([])


ODD = (
    *("[]", "{", "[" * 100_000, "\xff", '{"scores": 5, "models": 5, "paired": 5}'),
    '{"scores": [{"task": []}], "text": "t", "context": 2, "paired": [], "models": [[]]}',
    '{"text": 1, "context": 2, "paired": [], "models": [{"name": "a", "stderr": null, "loss": "x", "targets": 1}]}',
    '{"text": 1, "context": 2, "paired": [], "models": [{"name": 1, "stderr": 1, "loss": 1e9, "targets": 1}]}',
    '{"scores": [{"checkpoint": "a", "task": "b", "shots": 0, "metric": "acc", "score": "x", "stderr": 1}]}',
)


@pytest.mark.parametrize("option", ["--scores", "--paired"])
@pytest.mark.parametrize("content", ODD, ids=range(len(ODD)))
def test_odd_results_are_one_clear_line(tmp_path, option, content):
    folder = run_folder(tmp_path / "a", {1e9: 3.6})
    (tmp_path / "x.json").write_text(content, encoding="latin-1")
    with pytest.raises(SystemExit, match=r"report: .*x.json: not a (results.json|file that eval.perplexity)") as error:
        report.main([str(folder), option, str(tmp_path / "x.json"), "--out", str(tmp_path / "out")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config, record",
    [
        ([1], {}),
        ("[" * 100_000, {}),
        (dict(model=[1]), {}),
        (dict(model=SMALL | dict(n_layer="two")), {}),
        (dict(data=dict(path=5)), {}),
        (dict(optim="x"), {}),
        (dict(steps="many"), {}),
        ({}, dict(measured_on="val")),
        ({}, dict(val_loss="low")),
        ({}, dict(tokens=None)),
        ({}, dict(mfu=[1])),
        ({}, dict(train_s="long")),
        ({}, dict(val_bits_per_byte="x")),
    ],
)
def test_a_run_folder_with_odd_content_is_one_clear_line(tmp_path, config, record):
    folder = run_folder(tmp_path / "a", {1e9: 3.6})
    saved = json.loads((folder / "config.json").read_text())
    text = config if isinstance(config, str) else json.dumps(saved | config if isinstance(config, dict) else config)
    (folder / "config.json").write_text(text)
    record = dict(step=1, tokens=5, val_loss=3.0) | record
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    for words in ([str(folder), "--out", str(tmp_path / "out")], ["--on-track", str(folder)]):
        with pytest.raises(SystemExit, match="not a run of train_gpt.py|config.json: not readable as JSON") as error:
            report.main(words)
        assert "\n" not in str(error.value)


def test_folders_that_are_no_runs_are_skipped_in_one_line(tmp_path, capsys):
    run_folder(tmp_path / "good", {1e9: 3.6})
    for name in ("report", "scores", "sweeps/gamma-laptop/run"):
        (tmp_path / name).mkdir(parents=True)
    run_folder(tmp_path / "young", {1e9: 3.6})
    (tmp_path / "young/metrics.jsonl").write_text('{"step": 1, "tokens": 5, "loss": 3}\n')
    (tmp_path / "paired.json").write_text("{}")
    report.main([*map(str, sorted(tmp_path.iterdir())), "--out", str(tmp_path / "out"), "--html"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("report: skipped 5 of 6: ")
    for problem in (
        "report: not a run",
        "scores: not a run",
        "sweeps: not a run",
        "young: no evaluation",
        "paired.json: n",
    ):
        assert f"{tmp_path}/{problem}" in line
    assert "| good | AdamW |" in (tmp_path / "out/report.md").read_text()
    with pytest.raises(SystemExit, match="report: .*report: not a run folder .no config.json.; .*young: no evaluation"):
        report.main([str(tmp_path / "report"), str(tmp_path / "young")])


MEASURED = dict(data="abc", windows=50, tokens=51_200, sampling="fixed", tokenizer="gpt2", bytes_per_token=4.0)


def measured(folder, losses, on, **settings):
    """A run folder whose evaluations say what they were measured on."""
    run_folder(folder, losses, **settings)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [r | dict(measured_on=on) if "val_loss" in r else r for r in records]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def written(tmp_path, *runs):
    report.main([*map(str, runs), "--out", str(tmp_path / "out"), "--html"])
    return (tmp_path / "out/report.md").read_text(), (tmp_path / "out/report.html").read_text()


def section(text, title):
    """The rows of the first table after a heading, as lists of cells."""
    lines = text.partition(f"## {title}\n")[2].lstrip("\n").split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]


def test_the_page_begins_with_the_settings_that_differ(tmp_path):
    a = measured(tmp_path / "a", {1e9: 3.6}, MEASURED, lr=0.01, betas=[0.9, 0.95])
    b = measured(tmp_path / "b", {1e9: 3.5}, MEASURED, optimizer="mars_m", lr=0.02, gamma=0.025, momentum=0.95)
    config = json.loads((b / "config.json").read_text()) | dict(seed=7, name="b", log=dict(folder="x"))
    (b / "config.json").write_text(json.dumps(config))
    text, html = written(tmp_path, a, b)
    header, *rows = section(text, "Settings that differ")
    assert header == ["setting", "a", "b"]
    assert sorted(rows) == [
        ["optim, other", "betas=0.9, 0.95", "gamma=0.025, momentum=0.95"],
        ["optim.lr", "0.01", "0.02"],
        ["optimizer", "adamw", "mars_m"],
        ["seed", "1", "7"],
    ]
    assert text.index("## Settings that differ") < text.index("![loss]") < text.index("## Runs")
    assert "Warning" not in text
    assert "<h2>Settings that differ</h2>" in html
    assert "optim.lr" in html.partition("<h2>Runs</h2>")[0]
    text, _ = written(tmp_path, a)
    assert "Settings that differ" not in text
    text, _ = written(tmp_path, a, measured(tmp_path / "c", {1e9: 3.4}, MEASURED, lr=0.01, betas=[0.9, 0.95]))
    assert "## Settings that differ\n\nNone." in text


def test_many_runs_are_rows(tmp_path):
    runs = [measured(tmp_path / f"r{i}", {1e9: 3.6}, MEASURED, lr=0.01 * i) for i in range(1, 9)]
    text, _ = written(tmp_path, *runs)
    assert section(text, "Settings that differ")[:3] == [["run", "optim.lr"], ["r1", "0.01"], ["r2", "0.02"]]


@pytest.mark.parametrize("old", [False, True])
def test_other_validation_data_are_a_warning_and_have_tables_of_their_own(tmp_path, old):
    """old: the runs record the data of their evaluations in config.json only."""
    runs = [
        measured(tmp_path / name, {1e9: loss}, None if old else MEASURED | dict(windows=windows))
        for name, loss, windows in (("a", 3.6, 50), ("b", 3.5, 50), ("c", 2.9, 80))
    ]
    for run, windows in zip(runs, (50, 50, 80), strict=True):
        config = json.loads((run / "config.json").read_text())
        config["data"]["val_windows"] = windows
        (run / "config.json").write_text(json.dumps(config))
    text, html = written(tmp_path, *runs)
    warning = "Warning: validation data differ.{} Compare losses inside a group only. Groups: 1: a, b; 2: c."
    assert f"**{warning.format('**')}" in text.partition("## Settings")[0]
    assert warning.format("</strong>") in html
    settings = section(text, "Settings that differ")
    assert ["data.val_windows", "50", "50", "80"] in settings
    assert (["measured on: windows", "50", "50", "80"] in settings) == (not old)
    rows = section(text, "Runs")
    assert [row[rows[0].index("group")] for row in rows[1:]] == ["1", "1", "2"]
    tables = text.partition("## Best validation loss")[2].partition("## On track")[0]
    assert [line.split()[1] for line in tables.splitlines() if line.startswith("| ")] == ["run", "a", "b", "run", "c"]


def test_losses_of_different_tokenizers_are_in_bits_per_byte(tmp_path):
    """2.7 nats per byte are 3.9 bits; 4.78 nats per token of 4 bytes are 1.7."""
    byte_model = asdict(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=257))
    byte = measured(
        tmp_path / "byte", {1e9: 2.70}, MEASURED | dict(tokenizer="byte", bytes_per_token=1.0), model=byte_model
    )
    pairs = measured(tmp_path / "pairs", {1e9: 4.78}, MEASURED)
    text, html = written(tmp_path, byte, pairs)
    assert "**Warning: tokenizers differ, and so the validation data do.** Losses are in bits per byte." in text
    assert "Bits per byte. Brackets" in text
    rows = {row[0]: row for row in section(text, "Runs")}
    best = rows["run"].index("best loss")
    assert (rows["byte"][best], rows["pairs"][best]) == ("3.8953", "1.7240")
    assert '<td style="text-align:right">1.7240</td>' in html
    unknown = measured(tmp_path / "unknown", {1e9: 2.70}, MEASURED | dict(tokenizer="x", bytes_per_token=None))
    text, _ = written(tmp_path, unknown, pairs)
    assert "Losses per token cannot be compared" in text
    assert "4.7800" in text


def test_on_track_uses_the_evaluations_that_are_measured_as_the_last_one(tmp_path, capsys):
    run = measured(tmp_path / "a", {1e9: 2.5, 5e9: 2.5, 20e9: 3.03}, MEASURED)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[:4] = [line.replace('"windows": 50', '"windows": 5') for line in lines[:4]]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    report.main(["--on-track", str(run)])
    assert "best loss 3.030, published 3.024" in capsys.readouterr().out
    other = measured(tmp_path / "b", {20e9: 3.03}, MEASURED | dict(tokenizer="tokenizer-0123"))
    assert "nothing published to compare with" in on_track(read_run(other))


def test_runs_with_one_name_are_told_apart(tmp_path):
    runs = [measured(tmp_path / place / "run", {1e9: 3.6}, MEASURED) for place in "ab"]
    text, _ = written(tmp_path, *runs)
    assert all(f"| {run} | AdamW |" in text for run in runs)


@pytest.mark.parametrize(
    "backend", ["module://matplotlib_inline.backend_inline", "module://missing_module", "nonsense"]
)
def test_the_backend_of_a_notebook_does_not_stop_curves(tmp_path, backend):
    """Images are complete: there is no temporary file beside them."""
    run_folder(tmp_path / "a", {1e9: 3.6})
    with open(tmp_path / "a/metrics.jsonl", "a") as f:
        f.write('{"step": 2, "tokens": 5, "loss": 3, "grad_norm": 1, "lr": 0.1}\n')
    script = f"""
from training import plot
from scripts import report
plot.main([{str(tmp_path / "a")!r}])
report.main([{str(tmp_path / "a")!r}, "--out", {str(tmp_path / "out")!r}])
import os
assert os.environ["MPLBACKEND"] == {backend!r}
"""
    variables = environment() | {"MPLBACKEND": backend}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for image in (tmp_path / "a/curves.png", tmp_path / "out/report.png"):
        assert image.read_bytes().startswith(b"\x89PNG")
        assert not list(image.parent.glob("*.tmp"))


def test_the_report_in_html_is_one_file_with_curves_tables_configs_and_samples(tmp_path):
    run = byte_run(tmp_path / "runs", byte_dataset(tmp_path / "data"), name="<b>run")
    (run / "metrics.jsonl").write_text(json.dumps(dict(step=30, tokens=3000, val_loss=5.5)) + "\n")
    saved = json.loads((run / "config.json").read_text()) | dict(steps=30, batch_size=1, optim={})
    (run / "config.json").write_text(json.dumps(saved))
    report.main([str(run), "--html", f"--out={tmp_path / 'out'}"])
    page = (tmp_path / "out/report.html").read_text()
    assert 'src="data:image/png;base64,iVBOR' in page
    assert re.search(r"<td[^>]*>5.5000</td>", page)
    assert "&quot;n_layer&quot;: 2" in page
    assert "<b>" not in page
    assert "href=" not in page
    assert not re.search(r'src="(?!data:)', page)
    assert "no sample" not in page
    assert sample(tmp_path / "nothing").startswith("[no sample: ")


def test_the_notebook_compares_two_runs(dataset, tmp_path, monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    for name in ("adamw", "muon"):
        train_gpt.main(
            [str(CONFIG), f"--data.path={dataset}", f"--log.folder={tmp_path}", f"--optimizer={name}", f"--name={name}"]
        )
    notebook = json.loads((ROOT / "docs/compare_runs.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert '"../runs/mars_m"' in cells[0]
    found: dict = {}
    for cell in cells:
        exec(cell, found)
        found["RUNS"] = {name: str(tmp_path / name) for name in ("adamw", "muon")}
    assert found["validation"].index.tolist() == [4, 8, 12]
    assert "muon minus adamw, training loss" in capsys.readouterr().out
    assert found["difference"].abs().max() > 0
    assert found["rules"]["adamw"].shape == found["rules"]["muon"].shape
    assert [len(cell["outputs"]) for cell in notebook["cells"] if cell["cell_type"] == "code"] == [0, 2, 2, 1]
