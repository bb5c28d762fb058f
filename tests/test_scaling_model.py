"""The scaling model's arithmetic by hand, its inputs, and the slowed links of its validation."""

import json
from dataclasses import replace
from queue import Queue

import pytest
import torch

from bench import report, scaling_model, scaling_validation
from bench.scaling_model import Rates, Work, step_on, work_of
from bench.throttled import ThrottledGroup
from bench.timing import SIZES, shape_of

# 8 bytes a parameter pass a slow link in 2 x 3/4 x 4000 / 1500 = 4 s; the families' results in 0.4 s each
TOY = Work(params=1000, matrix=800, tail=0.25, families=((4, 1.0, 100), (2, 4.0, 200)))
ONE = Rates(tokens_per_s=1000, ns_s=1.2, elementwise_s=29.2)


def test_a_step_by_hand():
    step = step_on(TOY, ONE, link=1500, gpus=4, tokens=6000, last_tokens=3000)
    assert step.compute == pytest.approx(6)
    assert step.exposed_reduce == pytest.approx(2.2)  # 4 s, begun a tenth into 2 s of backward
    assert step.ns == pytest.approx(0.1 + 0.4)  # one matrix of each family: 1/12 and 4/12 of 1.2 s
    assert step.exposed_gather == pytest.approx(0.4)  # the first ends as the second begins, at 0.5 s
    assert step.elementwise == pytest.approx(22.0)  # (12 + 12/4) 800 + 30 x 200 + 4 x 1000 of 29200 bytes
    assert step.total == pytest.approx(31.1)
    assert step.efficiency == pytest.approx(6 / 31.1)
    hidden = step_on(TOY, ONE, link=1500, gpus=4, tokens=9000, last_tokens=9000)
    assert hidden.exposed_reduce == pytest.approx(1)  # the tail, a quarter of 4 s


def test_one_gpu_exposes_nothing():
    step = step_on(TOY, ONE, link=1500, gpus=1, tokens=6000, last_tokens=3000)
    assert (step.exposed_reduce, step.exposed_gather, step.ns, step.elementwise) == (0, 0, 1.2, 29.2)


# milliseconds: forward and backward of 7.5 sequences; Newton-Schulz and elementwise of one GPU; the step on 8 and on
# 64 GPUs at 480 sequences, from 6.23 GB of gradients and 2.95 GB of results at XL over 370 GB/s, a tenth as the tail
PUBLISHED = {
    "124M": (13.8, 3.0, 0.85, 112, 15.2, 0.91),
    "355M": (36.1, 14.4, 2.36, 293, 40, 0.90),
    "774M": (72.5, 42.3, 5.1, 590, 81, 0.89),
    "1558M": (139.6, 110, 10.25, 1142, 157, 0.89),
}


@pytest.mark.parametrize("size", SIZES)
def test_the_four_sizes(size):
    compute, ns, elementwise, on_8, on_64, efficiency = PUBLISHED[size]
    work = replace(work_of(shape_of(size)), tail=0.1)
    rates = Rates(7680 / (compute / 1e3), ns / 1e3, elementwise / 1e3)
    step = step_on(work, rates, 370e9, 8, 61440, 30720)
    assert 1e3 * step.total == pytest.approx(on_8, rel=0.01)
    step = step_on(work, rates, 370e9, 64, 7680, 7680)
    assert 1e3 * step.total == pytest.approx(on_64, rel=0.01)
    assert step.efficiency == pytest.approx(efficiency, abs=0.01)


def test_the_tail_holds_the_first_block_and_the_tied_table():
    work = work_of(shape_of("124M"))
    table, positions, block = 50304 * 768, 1024 * 768, 12 * 768**2 + 2 * 768
    assert work.params == table + positions + 12 * block + 768
    assert work.tail == pytest.approx((table + positions + 2 * block) / work.params, abs=1e-5)  # two blocks a bucket
    assert [(count, params) for count, _, params in work.families] == [(12, 3 * 768**2), (12, 768**2), (24, 4 * 768**2)]


def rows(capsys, *arguments):
    scaling_model.main(list(arguments))
    head, _, *lines = (line for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    keys = [key.strip() for key in head.strip("|").split("|")]
    return [dict(zip(keys, (c.strip() for c in line.strip("|").split("|")), strict=True)) for line in lines]


def test_without_a_measurement_every_row_says_so(capsys):
    table = rows(capsys)
    assert [(r["size"], r["gpus"]) for r in table] == [(s, str(w)) for s in SIZES for w in (1, 8, 64, 512)]
    assert [r["sequences"] for r in table[:4]] == ["480", "480", "512", "4096"]
    assert {r["rates"] for r in table} == {"assumed, not measured"}


def test_measured_rates_replace_assumed_ones(capsys, tmp_path):
    file = tmp_path / "ladder.jsonl"
    lines = [dict(bench="ladder", hardware="GPU X"), dict(size="124M", tokens_per_s=400e3), dict(note="no size")]
    lines += [dict(size="124M", rung="nanogpt", tokens_per_s=600e3)]  # a peer's, not ours
    lines += [dict(size="124M", tokens_per_s=500e3, optimizer_share=0.01, rung="best")]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    second = tmp_path / "second.jsonl"
    second.write_text(json.dumps(dict(size="1558M", tokens_per_s=50e3, ns_ms=100, elementwise_ms=10)))
    small, other, xl = rows(
        capsys, "--measured", str(file), str(second), "--gpus", "1", "--sizes", "124M", "355M", "1558M"
    )
    tokens = 480 * 1024
    assert small["rates"] == "measured on GPU X: tokens_per_s, optimizer_share; elementwise_ms assumed, not measured"
    assert float(small["step_ms"]) == pytest.approx(tokens / 500, rel=1e-3)  # the rate was the whole step's
    assert float(small["compute_ms"]) == pytest.approx(0.99 * tokens / 500, rel=1e-3)
    assert other["rates"] == "assumed, not measured"
    assert xl["rates"] == "measured on hardware not named: tokens_per_s, ns_ms, elementwise_ms"
    assert float(xl["step_ms"]) == pytest.approx(tokens / 50 + 110, rel=1e-3)


def test_slow_links_between_machines_count_between_machines(capsys):
    fast = rows(capsys, "--sizes", "124M", "--gpus", "8", "16")
    slow = rows(capsys, "--sizes", "124M", "--gpus", "8", "16", "--inter", "10")
    assert fast[0] == slow[0]
    assert float(slow[1]["exposed_reduce_ms"]) > 30 * float(fast[1]["exposed_reduce_ms"])


@pytest.mark.parametrize(
    "arguments, fault",
    [
        (
            ["--gpus", "64", "--batch_size", "480"],
            "480 sequences does not divide into 64 .* 60 processes, 80 proc",
        ),
        (["--gpus", "0"], "--gpus 0: must be above 0"),
        (["--inter", "-1"], "--inter -1.0: must be above 0"),
        (["--measured", "nowhere"], "--measured nowhere: .*No such file"),
        (["--measured", "text"], "--measured text: not JSON lines"),
        (["--measured", "empty"], "--measured empty: no row has a size"),
        (["--measured", "percent"], "optimizer_share=1.2: must be above 0, optimizer_share also below 1"),
    ],
)
def test_bad_input_is_answered_in_a_line(arguments, fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("fast\n")
    (tmp_path / "empty").write_text('{"size": "7B", "tokens_per_s": 1}\n')
    (tmp_path / "percent").write_text('{"size": "124M", "tokens_per_s": 1, "optimizer_share": 1.2}\n')
    with pytest.raises(SystemExit, match=fault):
        scaling_model.main(arguments)


class Wire:
    """A rank whose messages go to queues: what ThrottledGroup needs of gloo."""

    def __init__(self, rank, size, queues):
        self._rank, self._size, self.queues, self.bytes = rank, size, queues, 0

    def rank(self):
        return self._rank

    def size(self):
        return self._size

    def send(self, tensors, to, tag):
        self.bytes += tensors[0].nbytes
        self.queues[self._rank, to].put(tensors[0].clone())
        return Done(lambda: None)

    def recv(self, tensors, source, tag):
        return Done(lambda: tensors[0].copy_(self.queues[source, self._rank].get(timeout=60)))


class Done:
    def __init__(self, wait):
        self.wait = wait


@pytest.mark.parametrize("size", [2, 3, 4])
def test_rings_sum_and_gather_and_carry_what_the_model_says(size):
    queues = {(a, b): Queue() for a in range(size) for b in range(size)}
    wires = [Wire(rank, size, queues) for rank in range(size)]
    groups = [ThrottledGroup(wire, 1e12) for wire in wires]
    tensors = [torch.arange(10.0).view(2, 5) * (rank + 1) for rank in range(size)]
    work = [group.allreduce([x]) for group, x in zip(groups, tensors, strict=True)]
    for pending, x in zip(work, tensors, strict=True):
        assert pending.wait()
        assert torch.equal(x, torch.arange(10.0).view(2, 5) * sum(range(1, size + 1)))
    padded = -(-10 // size) * size
    assert {wire.bytes for wire in wires} == {2 * (size - 1) * 4 * padded // size}
    outputs = [torch.empty(size * 2, 3, dtype=torch.bfloat16) for _ in groups]
    mine = [torch.full((2, 3), rank).bfloat16() for rank in range(size)]
    work = [group.all_gather_single(o, x) for group, o, x in zip(groups, outputs, mine, strict=True)]
    assert all(pending.wait() for pending in work)
    assert all(torch.equal(o[:, 0].float(), torch.arange(size).repeat_interleave(2).float()) for o in outputs)


def test_validation_writes_measured_beside_predicted(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    scaling_validation.main(["--smoke"])
    (path,) = tmp_path.glob("scaling_validation_smoke*.jsonl")
    one, two = map(json.loads, path.read_text().splitlines()[1:])
    assert (one["processes"], two["processes"], two["link_MB_s"]) == (1, 2, 60)
    assert one["step_s"] == pytest.approx(one["predicted_s"])  # the model is fed with it
    assert two["predicted_reduce_s"] > 0 < two["predicted_gather_s"]
    assert two["step_s"] > 0
    with pytest.raises(SystemExit, match="--processes 3"):
        scaling_validation.main(["--processes", "3"])
