"""Which rule claims which parameter: every trainable tensor exactly once, by the role its model declares."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

ROLES = ("matrix", "embedding", "vector")


@dataclass(frozen=True)
class Claim:
    """A parameter, its name in the model and its role."""

    name: str
    param: Tensor
    role: str


def claim(named_parameters: Iterable[tuple[str, nn.Parameter]], roles: Mapping[str, str]) -> list[Claim]:
    """Give every trainable parameter its role.

    Raises ValueError for a parameter without a role, a role without a parameter, or an unknown role.
    """
    named = dict(named_parameters)
    trainable = {name: p for name, p in named.items() if p.requires_grad}
    if missing := trainable.keys() - roles.keys():
        raise ValueError(f"parameters without a role, which no rule would update: {', '.join(sorted(missing))}")
    if extra := roles.keys() - named.keys():
        raise ValueError(f"roles for parameters that do not exist: {', '.join(sorted(extra))}")
    if unknown := {roles[name] for name in trainable} - set(ROLES):
        raise ValueError(f"unknown roles {', '.join(sorted(unknown))}; known: {', '.join(ROLES)}")
    return [Claim(name, p, roles[name]) for name, p in trainable.items()]


def claim_table(optimizer: Optimizer, names: Mapping[Tensor, str]) -> list[tuple[str, str, str, str, str]]:
    """Who updates what: (tensor, shape, rule, learning rate, decay) of every parameter, in the order of `names`."""
    rows = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            rule, lr, decay = "raw x adaptive", group["lr"], group["weight_decay"]
            if hasattr(optimizer, "rule"):
                r = optimizer.rule(group, group.get("role") or optimizer.role_of(p))
                rule, lr, decay = str(r), r.lr, r.weight_decay
            rule += f" in {group['blocks']} blocks" if group.get("blocks", 1) > 1 else ""
            rows[p] = (names[p], "x".join(map(str, p.shape)), rule, f"{lr:g}", f"{decay:g}")
    return [rows[p] for p in names if p in rows]


def folded(rows: list[tuple[str, str, str, str, str]]) -> list[tuple[str, str, str, str, str]]:
    """A claim table with equal rows of different layers as one: "h.0" ... "h.11" become "h.*"."""
    counts: dict[tuple, int] = {}
    for name, *rest in rows:
        key = (re.sub(r"\.\d+\.", ".*.", name), *rest)
        counts[key] = counts.get(key, 0) + 1
    return [(f"{key[0]} ({n})" if n > 1 else key[0], *key[1:]) for key, n in counts.items()]


def grouped(claims: list[Claim], **settings: Any) -> list[dict[str, Any]]:
    """Parameter groups, one for each role and combination of settings.

    A setting is a dict from role to value, or a function of a Claim.
    """
    groups: dict[tuple, dict[str, Any]] = {}
    for c in claims:
        chosen = {key: s(c) if callable(s) else s[c.role] for key, s in settings.items()}
        group = groups.setdefault((c.role, *chosen.values()), {"params": [], "role": c.role, **chosen})
        group["params"].append(c.param)
    return list(groups.values())
