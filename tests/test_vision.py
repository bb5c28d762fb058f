"""bench.vision: the network, the image files, the selection on held-out images, and the report."""

import gzip
import hashlib
import io
import json
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import images, vision
from bench.images import DATASETS, load_images, read_idx
from bench.resnet import ResNet18
from bench.vision import ARMS, PUBLISHED, Result, Run
from optimizers import OPTIMIZERS, build_optimizer


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


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_treats_filters_as_matrices(arm):
    model = ResNet18(10, width=2)
    optimizer = build_optimizer(model, ARMS[arm].settings)
    if arm == "AdamW":
        return  # torch's class, which has no roles
    group = next(g for g in optimizer.param_groups if any(p is model.layer1[0].conv1.weight for p in g["params"]))
    rule, of_gain = (optimizer.rule_of(group, model.conv1.weight), optimizer.rule(group, "vector"))
    assert group["role"] == "matrix"
    if arm.startswith("MARS"):
        assert rule.correction is not None
        assert of_gain.correction is None


def test_every_optimizer_has_an_arm():
    used = {type(arm.settings): arm for arm in ARMS.values()}
    assert {type(settings) for settings in OPTIMIZERS.values()} == used.keys()
    assert all(arms.keys() <= ARMS.keys() for arms in PUBLISHED.values())


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
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte: is no complete idx file"):
        load_images("fashion", str(fashion))
    with pytest.raises(FileNotFoundError, match=r"--data names the folder of the idx files"):
        read_idx(fashion / "nothing")


def cifar_archive(folder, kind):
    """An archive in the official form with 20 images in each file; returns its MD5."""
    random = np.random.default_rng(0)
    with tarfile.open(folder / kind.name, "w:gz") as archive:
        for member in (*kind.train, kind.test):
            rows = random.integers(0, 256, (20, 3072), dtype=np.uint8)
            data = pickle.dumps({b"data": rows, kind.labels: random.integers(0, 10, 20).tolist()})
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return hashlib.md5((folder / kind.name).read_bytes()).hexdigest()


@pytest.mark.parametrize("name, train", [("cifar10", 100), ("cifar100", 20)])
def test_cifar_archives_are_read_and_others_refused(name, train, tmp_path, monkeypatch, capsys):
    kind = DATASETS[name]
    with pytest.raises(FileNotFoundError, match="python.tar.gz: no such file; get it from"):
        load_images(name, str(tmp_path))
    md5 = cifar_archive(tmp_path, kind.read)
    with pytest.raises(SystemExit) as stopped:
        vision.main([name, f"--data={tmp_path}"])
    assert f"has MD5 {md5} instead of {kind.read.md5}" in stopped.value.code
    monkeypatch.setitem(DATASETS, name, replace(kind, read=replace(kind.read, md5=md5)))
    found = load_images(name, str(tmp_path))
    assert len(found.train[1]) + len(found.validation[1]) == train
    assert found.test[0].shape == (20, 3, 32, 32)
    vision.main(
        [name, f"--data={tmp_path}", "--smoke", "--workers=1", f"--folder={tmp_path}", "--arms", "Muon", "MARS"]
    )
    assert "the same in the MARS paper" in capsys.readouterr().out  # published numbers stand beside


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


# ---- the comparison


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_learns_digits(arm):
    """Far above the 10 % of chance after 3 epochs of a network of width 4."""
    result = vision.train("", "cpu", Run("digits", 4, 3, 0, arm, 5 * ARMS[arm].lr, 0.1, 1))
    assert result.best_test >= result.test > 40


def test_equal_seeds_give_equal_results_and_batches():
    run = Run("digits", 2, 1, 0, "Muon", 0.01, 0.1, 3)
    assert vision.train("", "cpu", run) == vision.train("", "cpu", run)


def results(validation, test):
    """Results by (arm, lr, seed)."""

    def train(data, device, run):
        key = (run.arm, run.lr, run.seed)
        return Result(1.0, validation.get(key, 50.0), 0.5, test.get(key, 50.0), 0.4, 99.0)

    return train


def test_the_rate_is_selected_on_validation_images_and_other_seeds_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "RUNS", tmp_path / "runs")
    validation = {("AdamW", 0.002, 1): 90.0, ("Muon", 0.01, 1): 90.0}
    test = {("AdamW", 0.001, 1): 100.0}  # a try that is best on the test images is not chosen
    test |= {("AdamW", 0.002, 2): 80.0, ("AdamW", 0.002, 3): 82.0, ("Muon", 0.01, 2): 81.0, ("Muon", 0.01, 3): 84.0}
    monkeypatch.setattr(vision, "train", results(validation, test))
    words = ["digits", "--arms", "AdamW", "Muon", "--seeds=2", "--workers=1", f"--folder={tmp_path}"]
    vision.main(words)
    (path,) = tmp_path.glob("vision_digits_*.jsonl")
    facts, *rows = map(json.loads, path.read_text().splitlines())
    assert (facts["width"], facts["epochs"]) == (8, 6)
    muon, adamw = rows
    assert (adamw["lr"], muon["lr"]) == ("0.002 (edge)", "0.01")
    assert adamw["test %"] == "81.00 ± 1.41"
    # differences -1 and -2: mean -1.5, deviation 0.707, t = 12.706 for one degree of freedom
    assert adamw["difference to Muon"] == "-1.50 ± 6.35"
    assert adamw["best-of-test, loss and %"] == "0.400, 99.00"
    assert "the same in the MARS paper" not in adamw
    monkeypatch.setattr(vision, "train", results)  # everything is kept; a new run would raise TypeError
    vision.main(words)


def test_missing_scikit_learn_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit) as stopped:
        vision.main(["digits"])
    assert stopped.value.code == "bench.vision: digits needs scikit-learn: pip install scikit-learn"


def test_bad_options_are_one_line(capsys):
    for words, part in ((["digits", "--width=0"], "--width=0: must be at least 1"), (["mnist"], "invalid choice")):
        with pytest.raises(SystemExit) as stopped:
            vision.main(words)
        assert part in stopped.value.code
