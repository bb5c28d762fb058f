"""The parameter groups of any model."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .roles import assign_roles, folded, grouped

GROUP_OF = {"embedding": "embeddings", "matrix": "matrices", "vector": "vectors"}


def param_groups(model: nn.Module, roles: Mapping[str, str] | None = None, show: bool = False) -> list[dict[str, Any]]:
    """The trainable parameters of a model in up to four groups, which every optimizer of this package accepts.

    "name"          "role"       what is in it
    "embeddings"    "embedding"  weights of nn.Embedding and nn.EmbeddingBag; an output layer may share them
    "output layer"  "embedding"  weight of the last nn.Linear that is in no nn.ModuleList; of a model of Transformers,
                                 weight of what `get_output_embeddings()` returns
    "matrices"      "matrix"     other tensors with several rows and columns; filters count as (out, rest)
    "vectors"       "vector"     the rest: biases, gains, tables of one row

    So MARSM, Muon, NorMuon, Shampoo, SOAP and mars-shampoo treat only the matrices as matrices. As in a run of the
    trainer, only the matrices are decayed: the other groups have a "weight_decay" of 0. An empty group is left out.
    Before you make the optimizer, you can change a group, for example its "lr".

    "Last" means the order in which the model defines its modules. A table that is a bare nn.Parameter is taken for a
    matrix. If the printed table shows a wrong role, correct it by `roles`.

    roles: roles of some parameters by name, such as {"head.weight": "matrix"}, instead of those above.
    show: print group and role of every parameter. Equal parameters of different layers share a line.
    Warns if `roles` calls the weight of an nn.Embedding a matrix, because it would be orthogonalized. An optimizer that
    receives bare parameters, as in `MARSM(model.parameters())`, cannot see which are embeddings, and does not warn.
    Raises ValueError for an unknown role, and for the name of a parameter that the model does not have.
    """
    tables: set[Tensor] = {m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    output, found = _output_layer(model), {}
    for name, p in model.named_parameters():
        is_matrix = p.dim() >= 2 and p.shape[0] > 1 and p.shape[1:].numel() > 1
        found[name] = "embedding" if p in tables or p is output else "matrix" if is_matrix else "vector"
    assignments = assign_roles(model.named_parameters(), found | dict(roles or {}))
    for a in assignments:
        if a.role == "matrix" and a.param in tables:
            warnings.warn(
                f"{a.name}: an nn.Embedding has the role of a matrix, so MARSM and its like orthogonalize it",
                stacklevel=2,
            )
    is_output = {a.name: a.role == "embedding" and a.param is output and output not in tables for a in assignments}
    name_of = {a.name: "output layer" if is_output[a.name] else GROUP_OF[a.role] for a in assignments}
    if show:
        rows = [(a.name, "x".join(map(str, a.param.shape)), name_of[a.name], a.role) for a in assignments]
        lines = [("parameter", "shape", "group", "role"), *folded(rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print("\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines))
    groups = grouped(assignments, name=lambda a: name_of[a.name])
    return [g if g["role"] == "matrix" else g | {"weight_decay": 0.0} for g in groups]


def _output_layer(model: nn.Module) -> Tensor | None:
    """The weight of the layer that gives the model's output, if it can be told."""
    if hasattr(model, "get_output_embeddings"):
        return getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    inner = {m for layers in model.modules() if isinstance(layers, nn.ModuleList) for m in layers.modules()}
    return next((m.weight for m in reversed([*model.modules()]) if isinstance(m, nn.Linear) and m not in inner), None)
