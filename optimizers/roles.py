"""Roles of parameters, and the table that says how every tensor is updated."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

ROLES = ("matrix", "embedding", "vector")
Row = tuple[str, ...]  # of a table of parameters, the name first


class ModelWithRoles(Protocol):
    """A torch module that says which role each of its parameters has."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def parameter_roles(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class Assignment:
    """A parameter, its name in the model and its role."""

    name: str
    param: Tensor
    role: str


def assign_roles(named_parameters: Iterable[tuple[str, nn.Parameter]], roles: Mapping[str, str]) -> list[Assignment]:
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
    return [Assignment(name, p, roles[name]) for name, p in trainable.items()]


def grouped(assignments: list[Assignment], **settings: Mapping[str, Any] | Callable[[Assignment], Any]) -> list[dict]:
    """Parameter groups, one for each role and combination of settings.

    A setting is a mapping from role to value, or a function of an Assignment.
    """
    groups: dict[tuple, dict[str, Any]] = {}
    for a in assignments:
        chosen = {key: s(a) if callable(s) else s[a.role] for key, s in settings.items()}
        group = groups.setdefault((a.role, *chosen.values()), {"params": [], "role": a.role, **chosen})
        group["params"].append(a.param)
    return list(groups.values())


def update_table(optimizer: Optimizer, names: Mapping[Tensor, str]) -> list[Row]:
    """How each parameter is updated: name, shape, rule, learning rate, weight decay, in the order of `names`.

    The rule of another library's optimizer is its class name.
    """
    rows = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            rule, lr, decay = type(optimizer).__name__, group["lr"], f"{group.get('weight_decay', 0.0):g}"
            if rule_of := getattr(optimizer, "rule_of", None):
                r = rule_of(group, p)
                rule, lr, decay = f"{rule}: {r}", r.lr, f"{r.weight_decay:g}"
                decay += " cautious" if r.cautious and r.weight_decay else ""
            rule += f" in {group['blocks']} blocks" if group.get("blocks", 1) > 1 else ""
            rows[p] = (names[p], "x".join(map(str, p.shape)), rule, f"{float(lr):g}", decay)
    return [rows[p] for p in names if p in rows]


def folded(rows: Sequence[Row]) -> list[Row]:
    """A table of parameters with equal rows of different layers as one: "h.0" ... "h.11" become "h.*"."""
    counts: dict[tuple, int] = {}
    for name, *rest in rows:
        key = (re.sub(r"\.\d+\.", ".*.", name), *rest)
        counts[key] = counts.get(key, 0) + 1
    return [(f"{key[0]} ({n})" if n > 1 else key[0], *key[1:]) for key, n in counts.items()]
