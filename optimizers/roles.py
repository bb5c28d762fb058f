"""Which rule claims which parameter: every trainable tensor exactly once, by the role its model declares."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

ROLES = ("matrix", "embedding", "vector")


@dataclass(frozen=True)
class Claim:
    """A parameter, its name in the model and its role."""

    name: str
    param: Tensor
    role: str


def role_of(param: Tensor) -> str:
    """The role of a parameter nobody described: "matrix" from two dimensions on, else "vector"."""
    return "matrix" if param.dim() >= 2 else "vector"


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
