"""Which rule claims which parameter: every trainable tensor exactly once, by the role its model declares."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

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
