"""experiments.vision: the network, the image files, the runs, and their comparison by experiments.sweep."""

import gzip
import hashlib
import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.table import published as published_results
from experiments import images, vision
from experiments.images import DATASETS, load_images, read_idx
from experiments.resnet import ResNet18
from experiments.sweep import Sweep, load_plan, rows_of, table
from experiments.sweep import main as sweep_main
from optimizers import build_optimizer
from runtime.errors import UserError
from training.logger import read_metrics

PLAN = load_plan("vision")


def test_the_network_has_the_published_tensors():
    shapes = {name: tuple(p.shape) for name, p in ResNet18(10).named_parameters()}
    assert len(shapes) == 62
    assert sum(np.prod(s) for s in shapes.values()) == 11_173_962
    assert sum(p.numel() for p in ResNet18(100).parameters()) == 11_220_132
    assert list(shapes)[:4] == ["conv1.weight", "bn1.weight", "bn1.bias", "layer1.0.conv1.weight"]
    assert shapes["conv1.weight"] == (64, 3, 3, 3)
    assert shapes["layer2.0.shortcut.0.weight"] == (128, 64, 1, 1)
    assert shapes["layer4.1.conv2.weight"] == (512, 512, 3, 3)
    assert shapes["linear.bias"] == (10,)
    assert not [name for name in shapes if "conv" in name and "bias" in name]


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 28, 28), (2, 1, 8, 8)])
def test_the_network_takes_every_image_size(shape):
    assert ResNet18(10, width=2, channels=shape[1])(torch.randn(shape)).shape == (2, 10)


@pytest.mark.parametrize("arm", [arm for arm in PLAN.arms if arm != "AdamW"])  # torch's class, which has no roles
def test_every_arm_treats_filters_as_matrices(arm):
    model = ResNet18(10, width=2)
    optimizer = build_optimizer(model, digits(arm).optim)
    group = next(g for g in optimizer.param_groups if any(p is model.layer1[0].conv1.weight for p in g["params"]))
    rule, of_gain = (optimizer.rule_of(group, model.conv1.weight), optimizer.rule(group, "vector"))
    assert group["role"] == "matrix"
    if arm.startswith("MARS"):
        assert rule.correction is not None
        assert of_gain.correction is None


def test_published_errors_belong_to_arms():
    published = [p for p in published_results()["sweeps"] if p["plan"] == "vision"]
    assert len(published) == 20
    assert {p["arm"] for p in published} <= PLAN.arms.keys()


# ---- image files


def write_idx(path, array):
    header = b"\0\0\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    data = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def fashion(tmp_path):
    """A folder of idx files, one of them not packed. The class of an image is the column of its bright pixels."""
    random = np.random.default_rng(0)
    for name, count, end in (("train", 200, ".gz"), ("t10k", 50, "")):
        labels = random.integers(0, 10, count)
        pixels = random.integers(0, 100, (count, 28, 28))
        pixels[np.arange(count), :, 2 * labels + 4] = 255
        write_idx(tmp_path / f"{name}-images-idx3-ubyte{end}", pixels)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", labels)
    return tmp_path


def test_idx_files_are_read_packed_or_not(fashion):
    found = load_images("fashion", str(fashion))
    assert found.train[0].shape == (160, 1, 28, 28)
    assert found.validation[0].shape == (40, 1, 28, 28)
    assert found.test[0].shape == (50, 1, 28, 28)
    assert (found.train[0].float().mean((1, 2))[:, 4:24:2].argmax(1) == found.train[1]).all()


def test_a_damaged_or_missing_idx_file_is_named(fashion):
    path = fashion / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte: is not a complete idx file"):
        load_images("fashion", str(fashion))
    with pytest.raises(UserError, match=r"--data names the folder of the idx files"):
        read_idx(fashion / "nothing")


def cifar_archive(folder, kind):
    """An archive in the official binary form with 20 images in each file; returns its MD5, and the records of the test.

    A record is a label, or a coarse and a fine one, and the bytes of the image: red, green and blue rows.
    """
    random = np.random.default_rng(0)
    with tarfile.open(folder / kind.name, "w:gz") as archive:
        for member in (*kind.train, kind.test):
            records = random.integers(0, 256, (20, kind.labels + 3072), dtype=np.uint8)
            records[:, : kind.labels] %= 10
            info = tarfile.TarInfo(member)
            info.size = records.size
            archive.addfile(info, io.BytesIO(records.tobytes()))
    return hashlib.md5((folder / kind.name).read_bytes()).hexdigest(), records


@pytest.mark.parametrize("name, train, label", [("cifar10", 100, 0), ("cifar100", 20, 1)])
def test_cifar_archives_are_read_without_pickle_and_others_refused(name, train, label, tmp_path, monkeypatch):
    kind = DATASETS[name]
    with pytest.raises(UserError, match=r"binary.tar.gz: no such file; get it from"):
        load_images(name, str(tmp_path))
    md5, test = cifar_archive(tmp_path, kind.read)
    with pytest.raises(SystemExit) as stopped:
        vision.main([name, f"--data={tmp_path}"])
    assert f"has MD5 {md5} instead of {kind.read.md5}" in stopped.value.code
    monkeypatch.setitem(DATASETS, name, replace(kind, read=replace(kind.read, md5=md5)))
    found = load_images(name, str(tmp_path))
    assert len(found.train[1]) + len(found.validation[1]) == train
    assert found.test[1].tolist() == test[:, label].tolist()
    assert found.test[0][3, 2, 5, 7] == test[3, label + 1 + 2 * 1024 + 5 * 32 + 7]  # image 3, blue, row 5, column 7
    vision.main([name, f"--data={tmp_path}", "--width=2", "--epochs=1", "--name=run", f"--log.folder={tmp_path}"])
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == 1


def test_augmentation_moves_and_flips_but_keeps_the_image():
    kind = replace(DATASETS["cifar10"], mean=(0.0,) * 3, std=(1.0,) * 3)
    one = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    one[:, :, 10, 12] = 255
    found = images.Images(kind, (one, one), (one, one), (one, one))
    many = found.augmented(one.repeat(2000, 1, 1, 1), torch.Generator().manual_seed(0))
    assert (many.sum((2, 3)) == 1).all()
    rows, columns = (set((many[:, 0].sum(side) > 0).nonzero()[:, 1].tolist()) for side in (2, 1))
    assert rows == set(range(6, 15))  # 4 pixels up and down
    assert columns == {*range(8, 17), *range(15, 24)}  # and the same of the mirrored column 31 - 12


def test_held_out_images_are_not_trained_on():
    found = load_images("digits")
    parts = [{x.numpy().tobytes() for x in split[0]} for split in (found.train, found.validation, found.test)]
    assert [len(split[1]) for split in (found.train, found.validation, found.test)] == [1200, 237, 360]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


# ---- runs


def digits(arm, *words):
    """The configuration of a small run of an arm, at the middle one of its learning rates."""
    run = Sweep("vision", "digits").tuning(arm)[2]
    return vision.parse([*run.arguments, "--width=4", "--epochs=3", *words])[0]


@pytest.mark.parametrize("arm", PLAN.arms)
def test_every_arm_learns_digits(arm):
    """Far better than chance, an error of 90 %, after 3 epochs of a network of width 4."""
    records = list(vision.train(digits(arm), load_images("digits")))
    assert [r["epoch"] for r in records] == [1, 2, 3]
    assert (records[-1]["step"], records[-1]["images"]) == (30, 3600)
    assert records[-1]["gradient_evaluations"] == (60 if "exact" in arm else 30)
    assert min(records[-1]["test_error"], records[-1]["val_error"]) < 65


def test_equal_seeds_give_equal_runs():
    config = digits("Muon", "--width=2", "--epochs=1", "--seed=3")
    first, second = (next(vision.train(config, load_images("digits"))) for _ in range(2))
    assert first | dict(train_s=0) == second | dict(train_s=0)


def test_the_learning_rate_falls_to_a_tenth_twice(monkeypatch):
    rates = []
    monkeypatch.setattr(vision, "score", lambda *_: (1.0, 50.0))
    monkeypatch.setattr(
        vision, "optimizer_step", lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]) or 1
    )
    images = load_images("digits").limited(128)
    list(vision.train(digits("AdamW", "--epochs=8", "--lr=1"), images))
    assert rates == pytest.approx([1.0] * 4 + [0.1] * 2 + [0.01] * 2)


def test_a_run_that_diverges_says_so():
    config = digits("AdamW", "--lr=1e30")
    with pytest.raises(ValueError, match="epoch 1: the validation loss is not finite"):
        list(vision.train(config, load_images("digits").limited(128)))


def test_a_run_writes_its_configuration_and_a_record_per_epoch(tmp_path, capsys):
    words = ["digits", "--width=2", "--epochs=2", "--limit=130", "--optimizer=mars_m", "--gamma=0.1", "--name=a"]
    vision.main([*words, f"--log.folder={tmp_path}"])
    saved = json.loads((tmp_path / "a/config.json").read_text())
    assert (saved["width"], saved["optimizer"], saved["optim"]["gamma"]) == (2, "mars_m", 0.1)
    records = read_metrics(tmp_path / "a/metrics.jsonl")
    assert [r["step"] for r in records] == [2, 4]
    assert capsys.readouterr().out.count("% (test)") == 2


def test_a_finished_run_is_kept_and_other_settings_are_refused(tmp_path, capsys):
    words = ["digits", "--width=2", "--epochs=1", "--limit=130", "--name=a", f"--log.folder={tmp_path}"]
    vision.main(words)
    before = (tmp_path / "a/metrics.jsonl").read_bytes()
    saved = json.loads((tmp_path / "a/config.json").read_text())
    del saved["optim"]["eps"]  # as if the setting had been added since
    (tmp_path / "a/config.json").write_text(json.dumps(saved))
    capsys.readouterr()
    vision.main(words)
    assert "a: this run is finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"a: holds a run with other settings \(epochs: 1 -> 2\); give another --name"):
        vision.main([*words, "--epochs=2"])
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == before


# ---- the comparison by experiments.sweep


def test_the_tries_are_selected_on_held_out_images_and_test_images_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(Sweep, "root", str(tmp_path / "sweeps"))
    found = Sweep("vision", "cifar10", ["AdamW"])
    assert (found.count(), len(found.tuning("Muon"))) == (46, 20)  # 5 learning rates times 4 decays, then 3 seeds
    assert found.tuning("AdamW")[1].arguments[-5:-3] == ["--optim.lr=0.00025", "--optim.weight_decay=0.01"]

    def write(run, *errors, val_loss=0.0):
        """Errors (validation, test) of the epochs; the last epoch is the 200th."""
        run.path.mkdir(parents=True)
        for epoch, (val_error, test_error) in enumerate(errors, start=201 - len(errors)):
            record = dict(step=epoch, epoch=epoch, val_error=val_error, test_error=test_error, val_loss=val_loss)
            with open(run.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    for arm in ("AdamW", "Muon"):
        for run in found.tuning(arm):
            best = (run.lr, run.decay) == (found.rates(arm)[2], 0.1)
            # those that are best on the test images are not chosen; equal errors are decided by the loss
            write(run, (9.0, 1.0) if best else (9.0, 0.5), val_loss=0.1 if best else 0.2)
    for seed, (of_adamw, of_muon) in {2: (20.0, 19.0), 3: (18.0, 16.0), 4: (22.0, 19.0)}.items():
        write(replace(found.tuning("AdamW")[10], seed=seed), (5.0, 0.25), (50.0, of_adamw))
        write(replace(found.tuning("Muon")[10], seed=seed), (50.0, of_muon))
    muon, adamw = rows_of(found)
    assert (adamw["best_lr"], adamw["best_decay"], adamw["at_edge"]) == (0.001, 0.1, False)
    assert (muon["losses"], adamw["losses"]) == ([19, 16, 19], [20, 18, 22])
    assert (adamw["difference"], adamw["lowest"], muon["lowest"]) == (2, 0.25, 0.5)
    assert (adamw["published"], muon["published"]) == (pytest.approx(100 - 94.81), pytest.approx(100 - 95.08))
    text = table(found, [muon, adamw])
    assert "| lowest of any epoch and try | published |" in text
    assert "| AdamW | 0.001 | 0.1 | 20.00 | 2.00 | +2.00 ± 2.48 | 0.25 | 5.19 |" in text


def test_a_sweep_over_images_trains_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Sweep, "root", str(tmp_path / "sweeps"))
    path = tmp_path / "images.py"
    path.write_text(
        """
from experiments.plan import Arm, Plan, Scale
small = Scale("digits", "--width=2 --epochs=1 --limit=130", seeds=(1, 2), multiples=(1.0, 2.0), program="vision")
plan = Plan("Which is better?", "nothing", dict(AdamW=Arm("--optimizer=adamw", dict(small=0.01)),
    Wild=Arm("--optimizer=adamw", dict(small=1e30))), "AdamW", dict(small=small))
"""
    )
    sweep_main([str(path), "--folder", str(tmp_path), "--workers", "2"])
    text = (tmp_path / "sweep_images_small.md").read_text()
    assert "test error in %" in text
    assert "| Wild | 1e+30 (edge of the grid) | diverged on 1 of 1 seeds |" in text
    capsys.readouterr()
    sweep_main([str(path), "--commands"])
    assert capsys.readouterr().out.strip() == ""  # nothing is left to do
    assert (tmp_path / "sweep_images_small.png").stat().st_size > 10_000


def test_missing_scikit_learn_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit) as stopped:
        vision.main(["digits"])
    assert stopped.value.code == "experiments.vision: digits needs scikit-learn: pip install scikit-learn"


@pytest.mark.parametrize(
    "words, problem",
    [
        (["digits", "--width=0"], "--width: 0: must be at least 1"),
        (["mnist"], "invalid choice: 'mnist'"),
        (["digits", "--optimizer=muon", "--gama=0.1"], "config: gama: unknown key; nearest: "),
        (["digits", "--optimizer=adamw", "--gamma=0.1"], "config: gamma: this optimizer has no such setting"),
        (["digits", "--weight_decay=much"], "config: weight_decay=much: expected a number"),
        (["digits", "--optimizer=mars_m", "--gamma=auto"], "config: gamma=auto: expected a number of at least 0"),
        (["digits", "--lr=-1"], "config: lr=-1.0: must be a number of at least 0"),
    ],
)
def test_bad_options_are_one_line(words, problem):
    with pytest.raises(SystemExit) as stopped:
        vision.main(words)
    assert problem in stopped.value.code
    assert "\n" not in stopped.value.code


def test_settings_may_be_written_with_a_space():
    config, options = vision.parse(["digits", "--epochs", "3", "--optimizer", "muon", "--lr", "0.5", "--name", "run"])
    assert (config.epochs, config.optimizer, config.optim.lr, options.name) == (3, "muon", 0.5, "run")
