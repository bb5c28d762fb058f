"""Log-likelihoods, compared with a direct computation, in any order, batch and length."""

import random
from dataclasses import replace

import pytest
import torch
from small_runs import SHAPE, small_model

from eval.scoring import Scorer
from runtime.distributed import World


@pytest.fixture(scope="module")
def model():
    return small_model()


def direct(model, context, continuation):
    """One sequence, every position, no padding: log p and whether the argmax over all positions agrees."""
    ids = (context + continuation)[-(model.config.block_size + 1) :]
    with torch.no_grad():
        logp = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    n = min(len(continuation), len(ids) - 1)
    targets = torch.tensor(ids[-n:])
    return logp[-n:].gather(1, targets[:, None]).sum().item(), torch.equal(logp[-n:].argmax(-1), targets)


def requests(seed=0, lengths=(1, 5, 20, 60, 64, 65, 90)):
    rng = random.Random(seed)
    draw = [lambda n: [rng.randrange(257) for _ in range(n)]][0]
    return [(draw(n), draw(k)) for n in lengths for k in (1, 3, 70)]


def test_scores_equal_a_direct_computation_with_left_truncation(model):
    pairs = requests()
    scorer = Scorer(model)
    for (context, continuation), (logp, likeliest) in zip(pairs, scorer.loglikelihoods(pairs), strict=True):
        assert (logp, likeliest) == (pytest.approx(direct(model, context, continuation)[0], abs=2e-3), False)
    assert scorer.truncated == sum(len(c) + len(k) > 65 for c, k in pairs) > 5


def test_the_most_likely_continuation_is_marked(model):
    ids = [7, 8, 9]
    for _ in range(5):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    scorer = Scorer(model)
    wrong = [*ids[:-1], (ids[-1] + 1) % 257]
    assert [ok for _, ok in scorer.loglikelihoods([(ids[:3], ids[3:]), (wrong[:3], wrong[3:])])] == [True, False]


@pytest.mark.parametrize("batch_tokens", [1, 100, 3000])
def test_order_batch_and_padding_do_not_change_scores(model, batch_tokens):
    pairs = requests()
    pairs += [(context, [5, 6]) for context, _ in pairs]
    expected = Scorer(model).loglikelihoods(pairs)
    shuffled = list(range(len(pairs)))
    random.Random(1).shuffle(shuffled)
    got = Scorer(model, batch_tokens).loglikelihoods([pairs[i] for i in shuffled])
    for i, (logp, ok) in zip(shuffled, got, strict=True):
        assert (logp, ok) == (pytest.approx(expected[i][0], abs=2e-3), expected[i][1])


def test_padded_vocabulary_rows_never_count():
    clean, poisoned = small_model(poison=False), small_model()
    assert (poisoned.transformer.wte.weight[257:] == 50).all()
    pairs = requests()
    assert Scorer(poisoned).loglikelihoods(pairs) == Scorer(clean).loglikelihoods(pairs)


def test_an_empty_continuation_and_equal_inputs(model):
    pairs = [([1, 2], []), ([1, 2, 3], [4]), ([1, 2], [3, 4])]
    got = Scorer(model).loglikelihoods(pairs)
    assert got[0] == (0.0, True)
    for pair, (logp, _) in list(zip(pairs, got, strict=True))[1:]:
        assert logp == pytest.approx(direct(model, *pair)[0], abs=2e-3)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_halves_the_batch(model, monkeypatch, capsys, error):
    pairs = requests(lengths=(20,) * 8)
    expected = Scorer(model).loglikelihoods(pairs)
    whole, sizes = model.hidden, []

    def small_memory(ids):
        sizes.append(len(ids))
        if len(ids) > 3:
            raise error
        return whole(ids)

    monkeypatch.setattr(model, "hidden", small_memory)
    got = Scorer(model, 64 * 12).loglikelihoods(pairs)
    assert [g[0] for g in got] == pytest.approx([e[0] for e in expected], abs=2e-3)
    assert sizes[0] > 3
    assert sum(n > 3 for n in sizes) <= 4  # it does not fail again and again
    assert "out of memory: continuing with" in capsys.readouterr().err


def test_out_of_memory_with_one_sequence_is_one_clear_line(monkeypatch):
    model = small_model(config=replace(SHAPE, n_layer=1))

    def no_memory(ids):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "hidden", no_memory)
    with pytest.raises(ValueError, match="out of memory with one sequence of 3 tokens"):
        Scorer(model).loglikelihoods([([1, 2], [3, 4])])


def test_other_errors_are_raised(monkeypatch):
    model = small_model(config=replace(SHAPE, n_layer=1))

    def broken(ids):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(model, "hidden", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        Scorer(model).loglikelihoods([([1, 2], [3, 4])])


def test_ranks_share_the_work_and_get_all_scores(model):
    """One process acts as two ranks, one after the other; then `gather` returns the parts of both."""
    pairs, parts = requests(), []
    for rank in (0, 1):
        world = World(rank, 2, torch.device("cpu"))
        world.gather = lambda item: parts.append(item) or [item]
        Scorer(model, world=world).loglikelihoods(pairs)
    numbers = [list(part) for part, _ in parts]
    assert sorted(numbers[0] + numbers[1]) == list(range(len(pairs)))
    assert abs(len(numbers[0]) - len(numbers[1])) <= 3
    world.gather = lambda item: parts
    together, alone = Scorer(model, world=world).loglikelihoods(pairs), Scorer(model).loglikelihoods(pairs)
    for a, b in zip(together, alone, strict=True):
        assert a == (pytest.approx(b[0], abs=2e-3), b[1])
    world.gather = lambda item: [item, ({}, "out of memory with one sequence of 9 tokens")]
    with pytest.raises(ValueError, match="one sequence of 9 tokens"):
        Scorer(model, world=world).loglikelihoods(pairs)
