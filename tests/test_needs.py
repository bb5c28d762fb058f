"""What a run of each published size needs: the page, the preflight, and a calculation by hand agree."""

import pytest
from conftest import ROOT

import train_gpt
from bench import needs
from config.load import load_config


def test_the_page_of_needs_is_what_its_command_writes():
    assert needs.page() == (ROOT / needs.PAGE).read_text()


@pytest.mark.parametrize("size, machine", [("124M", "8xA100-80GB"), ("1558M", "8xA100-40GB"), ("774M", "1xH100")])
def test_the_needs_of_a_machine_are_those_that_the_preflight_prints(size, machine, capsys):
    config = ROOT / f"config/{needs.SIZES[size]}.py"
    train_gpt.main([str(config), "--micro_batch=auto", "--preflight", f"--as={machine}", "--data.path=nowhere"])
    printed = capsys.readouterr().out
    cards = machine.replace("x", " x ")
    row = next(r for r in needs.machine_rows() if r[:2] == [size, cards])
    gpus = int(machine.partition("x")[0])
    assert f"at least {row[3]} a process" in printed
    assert f"{row[4]} are available" in printed
    assert f"480 sequences = {gpus} processes x {row[2]} x {480 // gpus // int(row[2])}, estimated to fit" in printed
    # by hand: 6 N + 12 L C T operations a token, N without the positions, at 40 % of the peak
    shape = load_config(config).model
    n, c, context = shape.n_layer, shape.n_embd, 1024
    weights = 12 * n * c**2 + shape.padded_vocab_size * c + (2 * n + 1) * c
    peak = {"H100": 989e12, "A100": 312e12}[machine.partition("x")[2][:4]]
    hours = 49_152_000_000 * (6 * weights + 12 * n * c * context) / (0.4 * gpus * peak) / 3600
    assert row[5] == f"{hours:,.0f}"
    checkpoints = next(r for r in needs.checkpoint_rows() if r[0] == size)
    assert f"{checkpoints[3]} for {checkpoints[1]} checkpoints" in printed


def test_hours_of_preparation_follow_the_slower_of_workers_and_main_process():
    rows = {row[0]: row for row in needs.data_rows(parent=0.02, worker=0.1)}
    assert rows["`openwebtext`"][4:] == ["0.12", "0.05"]  # 9,000 x 0.1 / 2 s, and 9,000 x 0.02 s
    assert rows["`pretokenized fineweb_edu_10B`"][2:] == ["20.00 GB", "20.00 GB", "none", "none"]
