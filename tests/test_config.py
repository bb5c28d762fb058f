"""Config files, overrides and their errors."""

import dataclasses
import re
import runpy
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, ROOT

from config.load import NANOGPT, ConfigError, describe_keys, load_config, parse
from config.published import published
from data.shards import ShardEntry, write_manifest
from model import GPT
from optimizers import OPTIMIZERS, build_optimizer
from runtime.command import parse_number
from training.memory import divisors
from training.run_config import SECTIONS, RunConfig, all_keys, value_of
from training.schedule import learning_rate

SHIPPED = sorted(p for p in (ROOT / "config").glob("*.py") if "\nconfig = " in p.read_text())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_names_its_runs(path):
    config = load_config(path)
    assert config.size == path.stem
    assert config.name.startswith(f"{path.stem}-{config.optimizer}-{Path(config.data.path).name}-")
    assert config.per_process(1) == 480 or not path.stem.startswith("gpt2_")


@pytest.mark.parametrize("size", ["small", "medium", "large", "xl"])
def test_the_four_sizes_have_the_settings_of_the_papers(size):
    path = ROOT / "config" / f"gpt2_{size}.py"
    for optimizer in ("adamw", "lion", "muon", "muon_original", "mars", "mars_lion", "mars_shampoo", "mars_m"):
        run = load_config(path, [f"--optimizer={optimizer}"])
        assert run.name == f"gpt2_{size}-{optimizer}-openwebtext-49.2B"
        assert run.tokens_per_step == 491_520
        assert [run.per_process(w) % run.micro_batch for w in (1, 2, 4, 8, 16, 32)] == [0] * 6
        with torch.device("meta"):
            model = GPT(run.model)
        steps = build_optimizer(model, run.optim)
        assert sum(len(g["params"]) for g in steps.param_groups) == len(list(model.parameters()))


def test_as_published_sets_what_the_official_runs_did():
    small = ROOT / "config" / "gpt2_small.py"
    run = load_config(small, ["--optimizer=mars_m"], as_published=True)
    assert run.name == "gpt2_small-mars_m-openwebtext-49.2B-published"
    assert (run.seed, run.grad_multiple, run.schedule.zero_first) == (5000, 4, True)
    assert (run.model.vocab_size, run.model.scale_attn_by_inverse_layer_idx) == (50304, True)
    assert (run.data.sampling, run.data.val_sampling, run.data.val_windows) == ("replacement", "random", 3000)
    o = run.optim
    assert (o.weight_decay, o.adamw_weight_decay, o.adamw_lr, o.adamw_eps_first) == (0.01, 0.01, None, True)
    assert load_config(small, ["--optimizer=mars", "--seed=3"], as_published=True).optim.weight_decay_1d == 0.1
    assert load_config(small, ["--optimizer=mars", "--seed=3"], as_published=True).seed == 3
    assert load_config(small, ["--optimizer=muon_original"], as_published=True).optim.embeddings_as_matrices
    assert load_config(small, ["--optimizer=adamw"], True).optim == load_config(small, ["--optimizer=adamw"]).optim


def test_overrides_are_typed_by_the_schema():
    config = load_config(
        CONFIG, ["--optim.lr=1", "--betas=0.8,0.9", "--model.bias=true", "--steps=1e2", "--seed=7", "--data.path=a/b=c"]
    )
    assert (config.optim.lr, type(config.optim.lr)) == (1.0, float)
    assert config.optim.betas == (0.8, 0.9)
    assert config.model.bias is True
    assert (config.steps, type(config.steps)) == (100, int)
    assert config.data.path == "a/b=c"
    repeated = load_config(CONFIG, ["--lr=1", "--optim.lr=2", "--lr=3", "--log.folder=~/runs", "--data.path=~/text"])
    assert repeated.optim.lr == 3  # the last one counts
    assert (repeated.log.folder, repeated.data.path) == (str(Path.home() / "runs"), str(Path.home() / "text"))


def test_all_errors_are_reported_together():
    overrides = [
        "--optim.lrr=1",
        "--momentum=0.9",
        "--steps=1.5",
        "--bias=perhaps",
        "--dropout=2",
        "--betas=1",
        "--every=3",
        "warmup=3",
    ]
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIG, overrides)
    text = str(caught.value)
    assert "optim.lrr: unknown key; nearest: optim.lr" in text
    assert "momentum: this optimizer has no such setting; it has lr, betas, eps, weight_decay" in text
    assert "steps=1.5: expected a whole number" in text
    assert "bias=perhaps: expected true or false" in text
    assert "model.dropout=2.0: must be a number in [0, 1)" in text
    assert "betas=1: expected 2 numbers in [0, 1), for example 0.9,0.95" in text
    assert "every: could be checkpoint.every or log.every; give the full key" in text
    assert "warmup=3: expected --key=value" in text
    assert len(text.splitlines()) == 8


def test_a_switch_needs_no_value():
    assert load_config(CONFIG, ["--deterministic", "--background"]).compute.deterministic
    assert load_config(CONFIG, ["--compile"]).compile == "true"
    assert load_config(CONFIG, ["--wandb"]).log.wandb == "online"
    with pytest.raises(ConfigError, match="--dtype: expected --key=value"):
        load_config(CONFIG, ["--dtype"])
    with pytest.raises(ConfigError, match="--steps: expected --key=value"):
        load_config(CONFIG, ["--steps"])


@pytest.mark.parametrize(
    "argument, key, value",
    [
        *[(f"--compile={word}", "compile", "true") for word in ("true", "True", "1")],
        *[(f"--compile={word}", "compile", "false") for word in ("false", "False", "0")],
        ("--compile=auto", "compile", "auto"),
        *[(f"--log.wandb={word}", "log.wandb", "online") for word in ("True", "1", "online")],
        *[(f"--wandb={word}", "log.wandb", "off") for word in ("False", "0", "null", "none", "None", "off")],
        *[(f"--wandb={word}", "log.wandb", word) for word in ("offline", "disabled")],
        ("--tensorboard=True", "log.tensorboard", True),
    ],
)
def test_switches_with_more_than_two_values_are_read_as_the_others(argument, key, value):
    assert value_of(load_config(CONFIG, [argument]), key) == value


def test_other_words_are_no_switch():
    for argument in ("--compile=maybe", "--wandb=maybe", "--gelu=true", "--dtype=1"):
        with pytest.raises(ConfigError, match="must be one of|expected one of"):
            load_config(CONFIG, [argument])


@pytest.mark.parametrize("name, ours", NANOGPT.items())
def test_the_error_for_a_name_of_nanogpt_says_the_key_here(name, ours):
    with pytest.raises(ConfigError, match=f"^config: {name}: nanoGPT's name; here: ") as caught:
        load_config(ROOT / "config/gpt2_small.py", [f"--{name}=1"])
    assert ours in str(caught.value)
    keys = re.findall(r"--([a-z_.0-9]+)", ours)
    assert set(keys) - {"fresh"} <= all_keys(load_config(ROOT / "config/gpt2_small.py", ["--optimizer=adamw"])).keys()
    assert keys or name in ("backend", "eval_only")


def test_nanogpt_way_to_resume_is_one_clear_line():
    for word in ("resume", "scratch"):
        with pytest.raises(ConfigError, match=f"init_from={word}: leave it out; the same command continues a run"):
            load_config(CONFIG, [f"--init_from={word}"])


@pytest.mark.parametrize(
    "given, size, used",
    [
        ([], 60, 60),  # the vocabulary of the config file
        ([], 257, 257),
        ([], 50257, 50257),
        ([], 30, 60),  # the config file's may be padding
        (["--vocab_size=128"], 257, 128),  # what the user wants; opening the dataset says whether it fits
        (["--vocab_size=320"], 257, 320),
    ],
)
def test_the_vocabulary_is_that_of_the_dataset(tmp_path, capsys, given, size, used):
    shard = ShardEntry("train_000000.bin", tokens=9, bytes=9, max_token=size - 1, sha256="")
    write_manifest(tmp_path, {"name": "x", "vocab_size": size, "eot": 0}, {}, {"train": [shard], "val": []})
    run = load_config(CONFIG, [f"--data.path={tmp_path}", *given])
    assert run.model.vocab_size == used
    note = f"note: vocab_size={size}: the tokenizer of {tmp_path} has {size} ids; {CONFIG} has 60, which does not fit"
    assert (note in capsys.readouterr().err) == (not given and used != 60)


def test_the_padded_vocabulary_of_the_published_runs_stays(tmp_path):
    write_manifest(tmp_path, {"name": "gpt2", "vocab_size": 50257, "eot": 50256}, {}, {"train": [], "val": []})
    small, data = ROOT / "config/gpt2_small.py", f"--data.path={tmp_path}"
    assert load_config(small, [data, "--optimizer=mars_m"], as_published=True).model.vocab_size == 50304
    (tmp_path / "manifest.json").write_text("{")  # what is wrong with it is said when the dataset is opened
    assert load_config(small, [data]).model.vocab_size == 50257


@pytest.mark.parametrize(
    "key, nearest", [("batchsize", "batch_size"), ("n_layers", "model.n_layer"), ("lr_min", "min_lr")]
)
def test_the_error_for_an_unknown_key_lists_the_nearest_keys(key, nearest):
    with pytest.raises(ConfigError, match=f"{key}: unknown key; nearest: .*{nearest}"):
        load_config(CONFIG, [f"--{key}=3"])


def test_errors_for_unknown_optimizers_and_files_list_the_known_ones():
    with pytest.raises(ConfigError, match='optimizer="adam": unknown; nearest: adamw'):
        load_config(CONFIG, ["--optimizer=adam"])
    for path in ("config/gpt9.py", "config", "nowhere/x.py"):
        with pytest.raises(ConfigError, match=f"{path}: no such .*; there are: .*gpt2_xl.py, .*quickstart") as caught:
            load_config(ROOT / path)
        assert "schema.py" not in str(caught.value)


@pytest.mark.parametrize(
    "text, error",
    [
        ("x = 1\nconfig = 1 / 0", r"broken.py:2: ZeroDivisionError: division by zero"),
        ("x = 1\nconfig = (", r"broken.py:2: SyntaxError: '\(' was never closed"),
        ("import the_neighbour\nconfig = the_neighbour.config()", r"the_neighbour.py:2: KeyError: 'a'"),
        ("import torch\n\ntorch.ones(2) @ torch.ones(3)", r"broken.py:3: RuntimeError: "),  # not a line of torch
        ("from data.loader import DataConfig\nDataConfig(pat=1)", r"broken.py:2: TypeError: DataConfig.__init__"),
        ("from config.load import load_config\nload_config('x.py')", r"broken.py:2: config: x.py: no such config file"),
        ("import missing_module", r"broken.py:1: ModuleNotFoundError: No module named 'missing_module'"),
        ("raise ValueError('two\\nlines')", r"broken.py:1: ValueError: two lines"),
        ("raise SystemExit", r"broken.py:1: SystemExit$"),
        ("\0", r"broken.py: (SyntaxError|ValueError)"),  # the latter in older Pythons
    ],
)
def test_an_error_in_a_config_file_is_one_line_with_its_place(tmp_path, monkeypatch, text, error):
    (tmp_path / "the_neighbour.py").write_text("def config():\n    return {}['a']")
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(ConfigError, match=error) as caught:
        load_config(tmp_path / "broken.py")
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(BaseException) as caught:  # noqa: PT011  # the error itself, with its traceback
        load_config(tmp_path / "broken.py")
    assert not isinstance(caught.value, ConfigError) or "x.py" in text


def test_a_file_without_a_config_is_one_line(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1")
    with pytest.raises(ConfigError, match="must define `config`, a RunConfig"):
        load_config(tmp_path / "empty.py")


def test_config_files_do_not_change_the_globals_of_the_loader():
    import config.load

    before = set(vars(config.load))
    load_config(CONFIG)
    assert set(vars(config.load)) == before


def test_batch_and_budget_in_tokens():
    config = load_config(CONFIG, ["--batch_tokens=192", "--tokens=1000"])
    assert (config.batch_size, config.steps) == (None, None)
    assert (config.sequences, config.tokens_per_step, config.total_steps) == (12, 192, 6)
    with pytest.raises(ConfigError, match="batch_tokens=100: must be a multiple of block_size=16"):
        load_config(CONFIG, ["--batch_tokens=100"])
    with pytest.raises(
        ConfigError, match=r"batch_size or batch_tokens: give exactly one \(batch_size=4 and batch_tokens"
    ):
        load_config(CONFIG, ["--batch_tokens=160", "--batch_size=4"])


def test_the_largest_micro_batch_that_divides_is_used():
    config = load_config(CONFIG, ["--batch_size=480", "--micro_batch=15"])
    counts = [config.per_process(w) for w in (1, 2, 4, 8, 16, 32, 48, 60)]
    assert counts == [480, 240, 120, 60, 30, 15, 10, 8]
    assert [divisors(count, 15)[0] for count in counts] == [15, 15, 15, 15, 15, 15, 10, 8]
    assert divisors(60, 8) == [6, 5, 4, 3, 2, 1]
    assert divisors(7, 4) == [1]


def test_a_batch_that_does_not_divide_is_an_error_with_advice():
    config = load_config(CONFIG, ["--batch_size=480"])
    with pytest.raises(ValueError, match="480 sequences does not divide into 7 processes; ") as caught:
        config.per_process(7)
    assert str(caught.value).endswith("use 6 processes or --batch_size=476 or --batch_size=483")
    with pytest.raises(ValueError, match="as_published sums .*: the config file must give micro_batch"):
        published(dataclasses.replace(config, micro_batch=None))


def test_run_names_contain_budget_and_overrides():
    assert load_config(CONFIG).name == "tiny_config-adamw-missing-2.3k"
    assert load_config(CONFIG, ["--tokens=5e6"]).name == "tiny_config-adamw-missing-5M"
    changed = load_config(CONFIG, ["--lr=0.003", "--seed=2", "--device=cpu", "--log.every=5"])
    assert changed.name == "tiny_config-adamw-missing-2.3k-lr0.003-seed2"
    assert load_config(CONFIG, ["--min_lr=none"]).name == "tiny_config-adamw-missing-2.3k-min_lrnone"
    assert load_config(CONFIG, ["--steps=none", "--tokens=5e6"]).name == "tiny_config-adamw-missing-5M"
    for name in ("../elsewhere", "two\nlines", "\udcff"):
        with pytest.raises(ConfigError, match="must be a plain folder name"):
            load_config(CONFIG, [f"--name={name}"])


def test_parse_reads_none_for_optional_keys_only():
    keys = all_keys(load_config(CONFIG))
    assert parse("none", keys["micro_batch"]) is None
    assert parse("auto", keys["steps"]) is None
    assert parse("none", keys["name"]) == "none"
    with pytest.raises(ValueError, match="expected a whole number"):
        parse("none", keys["seed"])
    with pytest.raises(ValueError, match="expected a number"):
        parse("true", keys["grad_clip"])


@pytest.mark.parametrize(
    "text, value", [("10B", 10**10), ("0.5M", 500_000), ("480k", 480_000), ("1e9", 10**9), ("12", 12)]
)
def test_numbers_as_people_write_them(text, value):
    config = load_config(CONFIG, [f"--tokens={text}", "--warmup=0"])
    assert (config.tokens, type(config.tokens)) == (value, int)
    assert load_config(CONFIG, ["--lr=2.5e-3"]).optim.lr == 0.0025
    with pytest.raises(ConfigError, match="must be a number of at least 0"):
        load_config(CONFIG, ["--lr=1e308k"])
    for wrong in ("1.5", "ten", "0.0000001M", "B", "1e999", "1e308k"):
        with pytest.raises(ConfigError, match=f"tokens={wrong}: expected a whole number from 1 to "):
            load_config(CONFIG, [f"--tokens={wrong}"])


def test_more_ways_to_write_a_number():
    run = load_config(CONFIG, ["--tokens=1.001k", "--batch_tokens=0.032K", "--warmup=0"])
    assert (run.tokens, run.batch_tokens) == (1001, 32)
    values = {"10B": 10**10, "10b": 10**10, "1e9": 10**9, "10_000": 10_000, "0.5M": 500_000, "2.3t": 23 * 10**11}
    for text, value in values.items():
        assert (parse_number(text), type(parse_number(text))) == (value, int)
    with pytest.raises(
        ConfigError, match="batch_tokens=500000: must be a multiple of block_size=1024, as 499712 or 500736"
    ):
        load_config(CONFIG, ["--batch_tokens=0.5M", "--block_size=1024"])


def test_a_negative_learning_rate_is_one_error():
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIG, ["--lr=-1"])
    assert str(caught.value) == "config: optim.lr=-1.0: must be a number of at least 0"


def test_keys_may_be_written_with_hyphens():
    assert load_config(CONFIG, ["--batch-size=24", "--data.val-windows=3"]).batch_size == 24


def test_moving_hyperparameters_are_checked_against_the_optimizer():
    assert load_config(CONFIG, ["--optimizer=mars_m", "--moves=gamma:0.1,momentum:0.99"]).moves["momentum"] == 0.99
    assert load_config(CONFIG, ["--optimizer=mars_m", "--gamma_end=0.1"]).moves == {"gamma": 0.1}
    both = ["--optimizer=mars_m", "--moves=momentum:0.99", "--gamma_end=0.1"]
    assert load_config(CONFIG, both).moves == {"gamma": 0.1, "momentum": 0.99}
    with pytest.raises(ConfigError, match='schedule.moves: muon cannot move "gamma"; it can move weight_decay, mome'):
        load_config(CONFIG, ["--optimizer=muon", "--moves=gamma:0.1"])
    with pytest.raises(ConfigError, match='schedule.moves: adamw cannot move "gamma"'):
        load_config(CONFIG, ["--optimizer=adamw", "--gamma_end=0.1"])
    with pytest.raises(ConfigError, match='schedule.moves: mars_m cannot move "lr"'):  # schedule.shape moves it
        load_config(CONFIG, ["--optimizer=mars_m", "--moves=lr:0.1"])
    with pytest.raises(ConfigError, match=r"schedule.moves: final momentum=1.0: must be a number in \[0, 1\)"):
        load_config(CONFIG, ["--optimizer=mars_m", "--moves=momentum:1"])
    assert load_config(CONFIG, ["--optimizer=adamw", "--moves=weight_decay:lr"]).moves == {"weight_decay": None}
    with pytest.raises(ConfigError, match=r"schedule.moves: final adamw_eps=0.0: must be a number above 0"):
        load_config(CONFIG, ["--optimizer=mars_m", "--moves=adamw_eps:lr"])  # the rate may become 0
    with pytest.raises(ConfigError, match="schedule.moves='gamma': must be names and final values"):
        load_config(CONFIG, ["--optimizer=mars_m", "--moves=gamma"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_help_lists_every_key_with_its_meaning(optimizer):
    config = load_config(CONFIG, [f"--optimizer={optimizer}"])
    lines = {line.split("=")[0].strip(): line for line in describe_keys(config).splitlines()}
    assert lines.keys() == {f"--{key}" for key in all_keys(config)}
    assert {key.split(".")[0] for key in all_keys(config) if "." in key} == set(SECTIONS)
    assert all(re.fullmatch(r"  --[\w.]+=\S*  \S.*", line) for line in lines.values())
    assert "peak learning rate" in lines["--optim.lr"]
    assert "sequences per step" in lines["--batch_size"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_no_shipped_optimizer_ends_above_six_tenths_of_its_peak(path):
    """Of those for which the config file has settings of its own."""
    for name in runpy.run_path(str(path)).get("optimizers", ()):
        run = load_config(path, [f"--optimizer={name}"])
        last = learning_rate(run.schedule, run.total_steps, run.total_steps, run.optim.lr)
        assert run.schedule.shape == "constant" or last <= 0.6 * run.optim.lr
    with pytest.raises(ConfigError, match=r"schedule.min_lr=0.1: is above optim.lr=0.01, the peak"):
        load_config(path, ["--optim.lr=0.01", "--min_lr=0.1"])


def test_a_config_file_may_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_a_config.py").write_text("from tests.tiny_config import config, optimizers")
    (tmp_path / "run.py").write_text("from neighbour_of_a_config import config, optimizers")
    assert load_config(tmp_path / "run.py").optim.lr == 0.01


def test_an_unknown_optimizer_does_not_hide_other_errors():
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIG, ["--optimizer=mars_n", "--steps=0", "--batch_size=1e999", "--seed=99999999999999999999"])
    text = str(caught.value)
    assert 'optimizer="mars_n": unknown; nearest: mars_m' in text
    assert "steps=0: must be a whole number from 1 to 2,147,483,648" in text
    assert "batch_size=1e999: expected a whole number" in text
    assert "seed=99999999999999999999: must be a whole number from 0 to 4,611,686,018,427,387,903" in text


def test_a_warm_up_longer_than_the_run_is_an_error():
    with pytest.raises(ConfigError, match="warmup=50: is longer than the run of 12 steps"):
        load_config(CONFIG, ["--warmup=50"])
    assert RunConfig(steps=10).errors() == ["schedule.warmup=2000: is longer than the run of 10 steps"]


def test_the_name_of_a_run_says_which_weights_it_starts_with():
    assert "-init_fromgpt2" in load_config(ROOT / "config/finetune.py", ["--data.path=data/tokens/mine"]).name
    given = load_config(ROOT / "config/gpt2_small.py", ["--init_from=runs/a"]).name
    assert given.count("init_from") == 1
