"""The optimizers on images, with a ResNet-18 (experiments/vision.py)."""

from experiments.plan import Arm, Plan, Scale

SHORT, LONG = ("digits", "fashion"), ("cifar10", "cifar100")


def arm(options: str, short: float, long: float) -> Arm:
    """The middles of the learning rates for short and for long runs."""
    return Arm(f"--optimizer={options}", dict.fromkeys(SHORT, short) | dict.fromkeys(LONG, long))


def scale(options: str, multiples: tuple[float, ...], decays: tuple[float, ...] = ()) -> Scale:
    dataset, _, rest = options.partition(" ")
    return Scale(dataset, rest, seeds=(1, 2, 3, 4), multiples=multiples, decays=decays, program="vision")


FASHION = "--data=/usr/share/datasets/fashion-mnist"  # where Debian's package dataset-fashion-mnist puts its files
# Gains and biases are updated by AdamW at this rate. The option has one name for MARS and another for Muon and others.
MARS, MUON = "--lr_1d=0.003", "--adamw_lr=0.003"
WIDE, DECAYS = (0.25, 0.5, 1.0, 2.0, 4.0), (1e-3, 1e-2, 1e-1, 1.0)
plan = Plan(
    question="Which optimizer has the lowest test error on images?",
    source="MARS paper, table of CIFAR-10 and CIFAR-100 in its ICML version",
    arms={
        "AdamW": arm("adamw", 6e-3, 1e-3),
        "Lion": arm("lion", 2e-3, 2e-4),
        "Shampoo": arm(f"shampoo {MUON}", 2e-2, 1e-2),
        "Muon": arm(f"muon {MUON}", 2e-2, 1e-2),
        "MARS": arm(f"mars {MARS}", 2e-2, 3e-3),
        "MARS exact": arm(f"mars --is_approx=false {MARS}", 5e-3, 3e-3),
        "MARS-Lion": arm(f"mars_lion {MARS}", 2e-3, 2e-4),
        "MARS-Lion exact": arm(f"mars_lion --is_approx=false {MARS}", 4e-3, 2e-4),
        "MARS-Shampoo": arm(f"mars_shampoo {MARS}", 2e-2, 1e-2),
        "MARS-Shampoo exact": arm(f"mars_shampoo --is_approx=false {MARS}", 2e-2, 1e-2),
        "MARS-M": arm(f"mars_m {MUON}", 2e-2, 1e-2),
        "MARS-M exact": arm(f"mars_m --is_approx=false {MUON}", 2e-2, 1e-2),
        "AdEMAMix": arm("ademamix", 6e-3, 1e-3),
        "SOAP": Arm("--optimizer=soap", dict(digits=6e-3, fashion=1.2e-2) | dict.fromkeys(LONG, 1e-3)),
        "NorMuon": arm(f"normuon {MUON}", 1e-2, 1e-2),
    },
    reference="Muon",
    scales=dict(
        digits=scale("digits --width=8 --epochs=6 --weight_decay=0.1", WIDE),
        fashion=scale(f"fashion {FASHION} --width=4 --epochs=3 --limit=2500 --weight_decay=0.1", WIDE),
        cifar10=scale("cifar10 --data=data/cifar", WIDE, DECAYS),
        cifar100=scale("cifar100 --data=data/cifar", WIDE, DECAYS),
    ),
)
