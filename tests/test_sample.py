"""Generation from a checkpoint."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment
from small_runs import byte_dataset, byte_run

import train_gpt
from data.prepare import command as prepare
from eval import sample
from eval.sample import choose, generate
from model import GPT, GPTConfig


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=24, vocab_size=70)).eval()
    for p in model.parameters():
        p.data *= 10  # away from uniform predictions
    model.transformer.wte.weight.data[70:] = 100.0  # padded rows that would win every draw
    return model


def test_greedy_generation_equals_the_argmax_of_the_whole_context(model):
    ids = [3, 1, 4]
    for new in generate(model, [3, 1, 4], 15, temperature=0):
        assert new == model(torch.tensor([ids]))[0, -1].argmax().item()
        ids.append(new)
    assert len(ids) == 18


def test_generation_continues_beyond_the_context_and_never_emits_a_padded_id(model):
    new = list(generate(model, [5] * 30, 100, temperature=5.0, seed=1))
    assert len(new) == 100
    assert max(new) < 70


def test_a_seed_gives_the_same_sample_again(model):
    draws = [list(generate(model, [1], 20, seed=s)) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_end_of_text_stops(model):
    full = list(generate(model, [3, 1, 4], 15, temperature=0))
    assert list(generate(model, [3, 1, 4], 15, temperature=0, eot=full[4])) == full[: full.index(full[4])]


@pytest.mark.parametrize(
    "settings, allowed",
    [(dict(top_k=2), {0, 1}), (dict(top_p=0.5), {0}), (dict(top_p=0.7), {0, 1}), (dict(), {0, 1, 2, 3})],
)
def test_top_k_and_top_p_keep_the_most_likely_ids(settings, allowed):
    logits = torch.tensor([[0.6, 0.25, 0.1, 0.05]]).log()
    settings = dict(temperature=1.0, top_k=0, top_p=1.0) | settings
    generator = torch.Generator().manual_seed(0)
    drawn = {choose(logits, generator=generator, **settings).item() for _ in range(300)}
    assert drawn == allowed


def test_the_command_prints_text_from_a_run_folder(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the cat sat on the mat\n" * 3000)
    prepare.main(["text", "--root", str(tmp_path / "text"), "--out", str(tmp_path / "tokens")])
    arguments = [f"--data.path={tmp_path / 'tokens'}", f"--log.folder={tmp_path}", "--name=run", "--vocab_size=257"]
    train_gpt.main(["tests/tiny_config.py", *arguments, "--steps=60", "--n_embd=32", "--dropout=0", "--eval_every=60"])
    capsys.readouterr()
    command = [str(tmp_path / "run"), "--prompt", "the cat", "--max-tokens", "30", "--samples", "2"]
    sample.main(command)
    output = capsys.readouterr().out
    assert output.count("the cat") >= 2
    sample.main(command)
    assert capsys.readouterr().out == output
    with pytest.raises(SystemExit, match="--temperature -1.0: must be 0 or between"):
        sample.main([*command, "--temperature", "-1"])
    with pytest.raises(SystemExit, match="neither a checkpoint"):
        sample.main([str(tmp_path)])


def test_a_console_that_shows_only_ascii_gets_all_of_the_text(tmp_path):
    run = byte_run(tmp_path, byte_dataset(tmp_path / "data"))
    command = [sys.executable, "-m", "eval.sample", str(run), "--prompt", "caf\u00e9 \u4e2d", "--max-tokens", "9"]
    ascii_only = environment() | {"PYTHONIOENCODING": "ascii", "LANG": "C"}
    done = subprocess.run(command, cwd=ROOT, env=ascii_only, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"caf\\xe9 \\u4e2d" in done.stdout
