"""The one optimizer: a gradient estimate times a direction, for every algorithm in this folder."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from optimizers.directions import (
    AdaptiveNumbers,
    MomentumNumbers,
    adaptive,
    adaptive_kernel,
    adaptive_numbers,
    mix,
    momentum_numbers,
    orthogonal_scale,
    signed,
)
from optimizers.newton_schulz import as_wide_matrices, by_shape, matrix_shape, newton_schulz_dtype, orthogonalize
from optimizers.roles import ROLES
from optimizers.rules import Rule, count_faults
from optimizers.share import Share
from optimizers.variance_reduction import EstimateNumbers, correction_weight, estimate_norm, taken, unit_norm_factor

BLOCK = 1 << 16  # elements worked on at a time on a CPU: five such float32 blocks stay in a core's cache
BATCH = 1 << 28  # elements of matrices orthogonalized at a time on a GPU: bounds the memory beside the weights
DTYPES = (torch.float32, torch.float64)


class ComposedOptimizer(Optimizer):
    """Base of the algorithms, which say what `rule` applies to a parameter of a given role.

    Parameter groups may carry "role" ("matrix", "embedding" or "vector"); parameters of a group without
    one are given a role by `role_of`. "blocks": n treats a matrix as n blocks of rows, each
    orthogonalized by itself. State is allocated when a parameter is added.

    In the exact form (is_approx=False) the loop evaluates the next batch at the current parameters and
    calls `update_previous_grad()`, then evaluates the current batch, calls `step()` and
    `update_last_grad()`.

    `grad_scale` and `found_inf` are read if a caller sets them, by the protocol of torch's gradient
    scaler. A step whose gradients are not all finite changes nothing.

    process_group: a group whose ranks hold equal gradients; orthogonalization is divided over it.
    compiled: run the elementwise rules through torch.compile.
    Raises ValueError, naming key and value, for impossible hyperparameters.
    """

    def __init__(
        self,
        params: Iterable,
        defaults: dict[str, Any],
        *,
        process_group: torch.distributed.ProcessGroup | None = None,
        compiled: bool = False,
    ) -> None:
        self.share = Share(process_group)
        self.owner: dict[Tensor, int] = {}  # of the parameters whose state one rank holds
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self._steps: dict[tuple[int, str], Tensor] = {}  # steps taken, by group and role, 0-d float64
        self._compiled, self._compilations = compiled, {}
        self._ahead = False  # exact form: whether the next batch's gradient is there
        self._scratch: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        super().__init__(params, defaults)

    # ---- what an algorithm says

    def rule(self, group: dict[str, Any], role: str) -> Rule:
        """The rule for a parameter of this role in this group, with the group's present numbers."""
        raise NotImplementedError

    def faults(self, group: dict[str, Any]) -> list[str]:
        """Everything wrong with a group's hyperparameters, a line each."""
        raise NotImplementedError

    def role_of(self, p: Tensor) -> str:
        """The role of a parameter whose group names none."""
        return "matrix" if p.dim() >= 2 else "vector"

    def __getstate__(self) -> dict[str, Any]:
        ours = ("share", "owner", "grad_scale", "found_inf", "_steps", "_compiled", "_ahead")
        fresh = dict(_compilations={}, _scratch={})
        return super().__getstate__() | {name: getattr(self, name) for name in ours} | fresh

    # ---- construction

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and allocate its state. Raises ValueError for bad hyperparameters or parameters."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        faults = self.faults(group)
        if group.get("role") not in (None, *ROLES):
            faults.append(f"role={group['role']!r}: must be one of {', '.join(ROLES)}")
        faults += count_faults(blocks=group.get("blocks", 1))
        for p in group["params"] if not faults else ():
            if p.dtype not in DTYPES or p.dtype != group["params"][0].dtype:
                faults.append(f"parameter of dtype {p.dtype}: must be float32 or float64, one of them in a group")
            elif self._role(group, p) == "matrix" and p.dim() < 2:
                faults.append(f"parameter of shape {tuple(p.shape)}: has the role of a matrix and is none")
            elif p.dim() and p.shape[0] % group.get("blocks", 1):
                faults.append(f"blocks={group['blocks']}: does not divide the rows of shape {tuple(p.shape)}")
        if faults:
            self.param_groups.pop()
            raise ValueError(f"{type(self).__name__}: {'; '.join(faults)}")
        group["constructed_lr"] = group["lr"]
        for role in ROLES:
            members = [p for p in group["params"] if p.numel() and self._role(group, p) == role]
            if members:
                self._allocate(group, role, members)

    def _role(self, group: dict[str, Any], p: Tensor) -> str:
        return group.get("role") or self.role_of(p)

    def _allocate(self, group: dict[str, Any], role: str, members: list[Tensor]) -> None:
        rule = self.rule(group, role)
        names = rule.states
        if rule.correction is not None and not group.get("is_approx", True):
            names += ("upcoming",)
        key = (len(self.param_groups) - 1, role)
        if rule.direction == "adaptive":
            self._steps[key] = torch.zeros((), dtype=torch.float64, device=members[0].device)
        if rule.direction == "orthogonal":
            for family in by_shape(members, group.get("blocks", 1)):
                self.owner |= {p: self.share.owner(i, len(family)) for i, p in enumerate(family)}
        for p in members:
            if self.owner.get(p, self.share.rank) == self.share.rank:
                self.state[p] = {name: torch.zeros_like(p, memory_format=torch.contiguous_format) for name in names}
                if rule.direction == "adaptive":
                    self.state[p]["step"] = self._steps[key]

    # ---- state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. Raises ValueError if it is another optimizer's or of other shapes."""
        ours = self.state_dict()
        if not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError("state_dict: has no state and param_groups")
        if [len(g["params"]) for g in ours["param_groups"]] != [len(g["params"]) for g in state_dict["param_groups"]]:
            raise ValueError("state_dict: its groups have other numbers of parameters")
        if ours["state"].keys() != state_dict["state"].keys():
            raise ValueError("state_dict: its state is that of other parameters")
        for i, mine in ours["state"].items():
            theirs = state_dict["state"][i]
            if mine.keys() != theirs.keys():
                raise ValueError(f"state_dict: parameter {i} has {sorted(theirs)}, expected {sorted(mine)}")
            for key, tensor in mine.items():
                if tensor.shape != torch.as_tensor(theirs[key]).shape:
                    raise ValueError(f"state_dict: {key} of parameter {i} has another shape than {tuple(tensor.shape)}")
        for saved in state_dict["param_groups"]:
            if missing := sorted(self.defaults.keys() - saved.keys()):
                raise ValueError(
                    f"state_dict: a group has no {', '.join(missing)}; it is not a {type(self).__name__}'s"
                )
        for i, mine in ours["state"].items():
            for key, tensor in mine.items():
                tensor.copy_(torch.as_tensor(state_dict["state"][i][key]))
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})

    @property
    def needs_lookahead(self) -> bool:
        """Whether the loop has to evaluate the next batch before each step (the exact form)."""
        return any(not group.get("is_approx", True) for group in self.param_groups)

    @torch.no_grad()
    def update_previous_grad(self) -> None:
        """Exact form: keep the present gradients, those of the next batch; where one is not finite, 0.

        A parameter without a gradient keeps what it had.
        """
        self._ahead = True
        for p, state in self.state.items():
            if "upcoming" in state and p.grad is not None:
                torch.nan_to_num(p.grad, nan=0.0, posinf=0.0, neginf=0.0, out=state["upcoming"])
                if self.grad_scale is not None:
                    state["upcoming"].mul_(self._inverse_scale())

    @torch.no_grad()
    def update_last_grad(self) -> None:
        """Exact form: what was kept becomes the previous gradient of the next step. Otherwise does nothing."""
        for state in self.state.values():
            if "upcoming" in state:
                state["previous"], state["upcoming"] = state["upcoming"], state["previous"]

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, bs: int | None = None) -> float | None:
        """Update every parameter that has a gradient.

        bs is accepted for loops written for the official MARS class and changes nothing.
        Raises ValueError for sparse, complex or half-precision gradients, for hyperparameters that have become
        impossible, and in the exact form without the next batch's gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        jobs = [
            Job(rule=self.rule(group, role), params=params, group=group, steps=self._steps.get((index, role)))
            for index, group in enumerate(self.param_groups)
            for role, params in self._with_gradient(group)
        ]
        if not jobs:
            return loss
        for job in jobs:
            job.factors = self._clip_factors(job)
        ok = self._all_finite(jobs)
        transfers = [t for job in jobs if job.rule.direction == "orthogonal" for t in self._start_families(job, ok)]
        for job in jobs:
            if job.rule.direction == "adaptive":
                self._step_adaptive(job, ok)
            elif job.rule.direction == "sign":
                self._step_signed(job, ok)
        for transfer in transfers:
            if transfer.work is not None:
                transfer.work.wait()
            self._run(_apply_all, transfer.updates, transfer.decay)
        self._ahead = False
        return loss

    def _with_gradient(self, group: dict[str, Any]) -> Iterator[tuple[str, list[Tensor]]]:
        if faults := self.faults(group):
            raise ValueError(f"{type(self).__name__}: {'; '.join(faults)}")
        if not group.get("is_approx", True) and not self._ahead:
            raise ValueError(
                "is_approx=False: call update_previous_grad() with the next batch's gradient before step()"
            )
        for role in ROLES:
            params = [p for p in group["params"] if p.grad is not None and p.numel() and self._role(group, p) == role]
            if params:
                _check_gradients(params)
                yield role, params

    def _clip_factors(self, job: "Job") -> list[Tensor | None]:
        """What scales each estimate to at most unit norm; None where that is not asked for or not ours to know."""
        held = [p for p in job.params if p in self.state]
        if not job.rule.clip:
            return [None] * len(held)
        cut = [self._cut((p.grad, self.state[p].get("previous"))) for p in held]
        norms = self._run(_estimate_norms, [x for c in cut for x in c], self._estimate_numbers(job))
        ends = list(accumulate(len(c) for c in cut))
        per_tensor = [norms[end - len(c) : end] for end, c in zip(ends, cut, strict=True)]
        job.norms = [n[0] if len(n) == 1 else torch.linalg.vector_norm(torch.stack(n)) for n in per_tensor]
        return [unit_norm_factor(norm) for norm in job.norms]

    def _all_finite(self, jobs: list["Job"]) -> Tensor:
        """0-d bool: whether this step is to be taken, from gradients alone, so that all ranks agree."""
        if self.found_inf is not None:
            return self.found_inf == 0
        known = [n for job in jobs if job.rule.direction == "adaptive" for n in job.norms]
        rest = [p.grad for job in jobs if job.rule.direction != "adaptive" or not job.norms for p in job.params]
        norms = known + ([get_total_norm(rest)] if rest else [])
        return torch.isfinite(torch.stack([n.double() for n in norms])).all()

    def _estimate_numbers(self, job: "Job", ok: Tensor | None = None) -> EstimateNumbers:
        like = job.params[0]
        on = torch.ones((), device=like.device) if ok is None else ok
        weight = None
        if job.rule.correction is not None:
            weight = torch.full((), correction_weight(*job.rule.correction), dtype=like.dtype, device=like.device)
        inverse = None if self.grad_scale is None else self._inverse_scale().to(like.dtype)
        return EstimateNumbers(on.to(like.dtype), inverse, weight)

    def _inverse_scale(self) -> Tensor:
        return self.grad_scale.reciprocal().nan_to_num(nan=0.0)

    def _step_adaptive(self, job: "Job", ok: Tensor) -> None:
        job.steps.add_(ok)
        r, like = job.rule, job.params[0]
        numbers = adaptive_numbers(ok, job.steps.clamp(min=1), r.lr, r.weight_decay, r.betas, r.eps, r.eps_first)
        numbers = type(numbers)(*(n.to(like.dtype) for n in numbers))
        pieces = self._pieces(job, ("previous", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
        arguments = (ok, job.steps, r.lr, r.weight_decay, r.betas, r.eps)
        kernel = None if r.eps_first or self._compiled else adaptive_kernel(*arguments)
        self._run(_adaptive_all, pieces, self._estimate_numbers(job, ok), job.remember, numbers, kernel)

    def _step_signed(self, job: "Job", ok: Tensor) -> None:
        numbers = momentum_numbers(ok, job.params[0], job.rule.lr, job.rule.weight_decay, job.rule.momentum)
        pieces = self._pieces(job, ("previous", "momentum"))
        self._run(_signed_all, pieces, self._estimate_numbers(job, ok), job.remember, numbers)

    def _pieces(self, job: "Job", keys: tuple[str, ...]) -> list[tuple]:
        """(clip factor, p, grad, *state tensors, scratch) of every parameter, on a CPU in blocks that fit its cache."""
        out = []
        for p, factor in zip(job.params, job.factors, strict=True):
            out += [(factor, *piece) for piece in self._cut((p, p.grad, *(self.state[p].get(k) for k in keys)))]
        return out

    def _cut(self, tensors: tuple[Tensor | None, ...]) -> list[tuple]:
        """Tensors of one shape as tuples of blocks, each with scratch memory that stays in the cache.

        Whole, and without scratch memory, on a GPU, compiled, or when not contiguous.
        """
        given = [t for t in tensors if t is not None]
        if self._compiled or given[0].device.type != "cpu" or not all(t.is_contiguous() for t in given):
            return [(*tensors, (None, None))]
        dtype, n = given[0].dtype, given[0].numel()
        if dtype not in self._scratch:
            self._scratch[dtype] = (torch.empty(BLOCK, dtype=dtype), torch.empty(BLOCK, dtype=dtype))
        whole, last = self._scratch[dtype], tuple(s[: n % BLOCK or BLOCK] for s in self._scratch[dtype])
        count = -(-n // BLOCK)
        columns = [t.view(-1).split(BLOCK) if t is not None else [None] * count for t in tensors]
        return list(zip(*columns, [whole] * (count - 1) + [last], strict=True))

    def _run(self, function: Callable, *arguments: Any) -> Any:
        """Call one of the functions below this class, compiled if this optimizer is."""
        if not self._compiled:
            return function(*arguments)
        if function not in self._compilations:
            self._compilations[function] = torch.compile(function, dynamic=False)
        return self._compilations[function](*arguments)

    def _start_families(self, job: "Job", ok: Tensor) -> Iterator["Transfer"]:
        """Momentum and Newton-Schulz of the matrices this rank owns, family by family of one shape.

        Each family's results are on their way to the other ranks while the next one is computed.
        """
        r, group = job.rule, job.group
        blocks = group.get("blocks", 1)
        numbers = momentum_numbers(ok, job.params[0], r.lr, r.weight_decay, r.momentum)
        estimate_numbers = self._estimate_numbers(job, ok)
        dtype = newton_schulz_dtype(r.ns_dtype, job.params[0].device)
        factors = dict(zip((p for p in job.params if p in self.state), job.factors, strict=True))
        for family in by_shape((p for p in group["params"] if p in self.owner), blocks):
            mine = [p for p in family if self.owner[p] == self.share.rank]
            done = {}
            for batch in self._batches([p for p in mine if p.grad is not None]):
                used = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in batch]
                pieces = [
                    (factors[p], *piece)
                    for p, u in zip(batch, used, strict=True)
                    for piece in self._cut((p.grad, self.state[p].get("previous"), self.state[p]["momentum"], u))
                ]
                self._run(_mix_all, pieces, estimate_numbers, job.remember, numbers)
                wide = [as_wide_matrices(u, blocks) for u in used]
                stack = torch.cat(wide) if len(wide) > 1 else wide[0]
                done |= zip(batch, orthogonalize(stack, r.ns_steps, r.eps, dtype).split(blocks), strict=True)
            like = as_wide_matrices(family[0], blocks)
            work, shared = self.share.gather([done.get(p) for p in mine], len(family), like.shape, dtype, like.device)
            updates = [
                (p, o, numbers.rate * orthogonal_scale(r.scale, *matrix_shape(p, blocks)))
                for p, o in zip(family, shared, strict=True)
                if p.grad is not None
            ]
            yield Transfer(work, updates, numbers.decay)

    def _batches(self, params: list[Tensor]) -> list[list[Tensor]]:
        """What is orthogonalized together: on a GPU as many as memory allows; on a CPU one by one, which is as fast,
        needs less memory, and gives results that do not depend on who else is there."""
        if not params:
            return []
        count = max(1, BATCH // params[0].numel()) if params[0].device.type == "cuda" else 1
        return [params[i : i + count] for i in range(0, len(params), count)]


@dataclass
class Transfer:
    """Orthogonal directions on their way between ranks, and the weights they will move."""

    work: torch.distributed.Work | None  # None: nothing to wait for
    updates: list[tuple[Tensor, Tensor, Tensor]]  # weight, direction (blocks, m, n), rate
    decay: Tensor


@dataclass
class Job:
    """One rule at work: the parameters of one role in one group that have a gradient."""

    rule: Rule
    params: list[Tensor]
    group: dict[str, Any]
    steps: Tensor | None  # adaptive: steps taken, 0-d
    norms: list[Tensor] = field(default_factory=list)  # of the estimates that are to be clipped
    factors: list[Tensor | None] = field(default_factory=list)

    @property
    def remember(self) -> bool:
        """Whether this step's gradient is the next one's previous gradient (the approximate form)."""
        return self.rule.correction is not None and self.group.get("is_approx", True)


def _check_gradients(params: list[Tensor]) -> None:
    for p in params:
        g = p.grad
        if g.is_sparse or g.dtype not in DTYPES:
            kind = "sparse" if g.is_sparse else str(g.dtype)
            raise ValueError(
                f"gradient of a parameter of shape {tuple(p.shape)} is {kind}: must be dense and float32 or float64; "
                "for embeddings set sparse=False, for lower precision keep the weights in float32 and use autocast"
            )


# ---- functions over lists of tensors, plain or compiled


def _estimate_norms(pieces: list[tuple], numbers: EstimateNumbers) -> list[Tensor]:
    return [estimate_norm(g, previous, numbers, scratch) for g, previous, scratch in pieces]


def _adaptive_all(
    pieces: list[tuple], e: EstimateNumbers, remember: bool, n: AdaptiveNumbers, kernel: Callable | None
) -> None:
    for factor, p, g, previous, m, v, v_max, scratch in pieces:
        c = taken(g, previous, factor, e, remember, scratch)
        if kernel is not None and scratch[0] is not None:  # a block of contiguous tensors on a CPU
            kernel(p, c, m, v, v_max)
        else:
            adaptive(p, c, m, v, v_max, n, scratch[0])


def _signed_all(pieces: list[tuple], e: EstimateNumbers, remember: bool, n: MomentumNumbers) -> None:
    for factor, p, g, previous, m, scratch in pieces:
        signed(p, taken(g, previous, factor, e, remember, scratch), m, n)


def _mix_all(pieces: list[tuple], e: EstimateNumbers, remember: bool, n: MomentumNumbers) -> None:
    for factor, g, previous, m, used, scratch in pieces:
        mix(taken(g, previous, factor, e, remember, scratch), m, n, out=used)


def _apply_all(updates: list[tuple], decay: Tensor) -> None:
    for p, direction, rate in updates:
        rows = direction.mT if direction.size(1) * direction.size(0) != p.shape[0] else direction
        p.mul_(decay).addcmul_(rows.reshape(p.shape).to(p.dtype), rate, value=-1)
