"""The base of every algorithm in this folder: a gradient, raw or corrected, times a direction."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from optimizers.directions import MatrixDirection, State, Step
from optimizers.matrices import Ownership, as_wide_matrices, families, from_wide_matrices, matrix_shape
from optimizers.norms import norm_of, norms_of_rows, total_norm
from optimizers.roles import ROLES
from optimizers.settings import Rule, Settings
from optimizers.variance_reduction import (
    GradientNumbers,
    clip_factors,
    clipped_gradient,
    corrected_norm,
    correction_weight,
)

BLOCK = 1 << 16  # elements worked on at a time on a CPU: five such float32 blocks stay in a core's cache
BATCH = 1 << 27  # elements of matrices worked on at a time on a GPU: bounds the memory beside the weights
# updates that share only 0-d numbers become one kernel, too
INDUCTOR: dict[str, Any] = {"score_fusion_memory_threshold": 1}
AT_ONCE = 10  # tensors in a compiled update: the compiler does not fuse operations that are more than 64 apart
OF_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")  # their keys in groups
DTYPES = (torch.float32, torch.float64)


class ComposedOptimizer(Optimizer):
    """Base of the algorithms. A subclass names its `settings`, whose `rule` says how each parameter is updated.

    Parameter groups may carry "role" ("matrix", "embedding" or "vector"); parameters of a group without one get
    their role from `role_of`. "blocks": n treats a matrix as n blocks of rows, each a matrix of its own.
    State is allocated when a parameter is added.

    Exact form (is_approx=False): the loop evaluates the next batch at the current parameters and calls
    `update_previous_grad()`, then evaluates the current batch and calls `step()` and `update_last_grad()`.

    `grad_scale` and `found_inf` are read if a caller sets them, as in torch's fused optimizers: gradients are divided
    by the first, and the step is skipped where the second is not 0. A step whose gradients are not all finite changes
    nothing.

    process_group: a group whose ranks hold equal gradients; the work on matrices is divided over it.
    compiled: run the elementwise updates through torch.compile.
    Raises ValueError, naming key and value, for impossible hyperparameters, and TypeError for unknown ones.
    """

    settings: ClassVar[type[Settings]]
    drop_in: ClassVar[dict[str, Any]] = {}  # defaults of the class where they differ from those of a run
    _step_supports_amp_scaling = True  # how torch's GradScaler and our trainer recognise grad_scale and found_inf

    def __init_subclass__(cls) -> None:
        if "settings" in vars(cls):  # the settings build this class, but not a subclass that reuses them
            cls.settings.optimizer = cls

    def __init__(
        self,
        params: Iterable,
        lr: float | None = None,
        *,
        process_group: torch.distributed.ProcessGroup | None = None,
        compiled: bool = False,
        **given: Any,
    ) -> None:
        given = given if lr is None else given | {"lr": lr}
        defaults = self.settings().as_group() | self.drop_in
        if unknown := sorted(given.keys() - defaults.keys()):
            raise TypeError(f"{type(self).__name__} has no argument {', '.join(unknown)}")
        self.ownership = Ownership(process_group)
        self._compiled = compiled
        if compiled:  # the functions below the class are compiled once for each combination of shapes
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        self._functions: dict[Callable, Callable] = {}  # compiled
        self._scratch: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._calls: dict[Tensor, int] = {}  # steps of each matrix; after loading, as its state counts them
        self._looked_ahead: list[dict[str, Tensor]] | None = None  # exact form: states with the next batch's gradient
        self._ahead_had_scale = False  # exact form: whether grad_scale was set when these gradients were kept
        super().__init__(params, defaults | given)

    def rule(self, group: dict[str, Any], role: str) -> Rule:
        """The rule for a parameter of this role in this group, with the group's present numbers."""
        settings = self.settings.of(group)
        constructed = float(group.get("constructed_lr", settings.lr))
        return settings.rule(role, settings.lr / constructed if constructed else 0.0)

    def rule_of(self, group: dict[str, Any], p: Tensor) -> Rule:
        """The rule for a parameter of this group."""
        return self.rule(group, self._role(group, p))

    def role_of(self, p: Tensor) -> str:
        """The role of a parameter whose group does not name a role.

        Convolution filters are matrices, flattened to (out, rest). The official MARS-M code orthogonalizes their 3x3
        slices instead, and its updates of filters are several times larger; its learning rates do not transfer.
        """
        return "matrix" if p.dim() >= 2 else "vector"

    def __getstate__(self) -> dict[str, Any]:
        ours = ("ownership", "_compiled", "_calls", "_looked_ahead", "_ahead_had_scale")
        return super().__getstate__() | {k: getattr(self, k) for k in ours} | dict(_functions={}, _scratch={})

    # ---- parameters and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and allocate its state. Raises ValueError for bad hyperparameters or parameters."""
        super().add_param_group(dict(param_group))  # a copy, so that the caller's dict can serve another optimizer
        group = self.param_groups[-1]
        errors = self.settings.of(group).errors() + self._group_errors(group)
        if errors:
            self.param_groups.pop()
            raise ValueError(f"{type(self).__name__}: {'; '.join(dict.fromkeys(errors))}")
        group["constructed_lr"] = float(self.defaults["lr"])
        for role in ROLES:
            members = [p for p in group["params"] if p.numel() and self._role(group, p) == role]
            if members:
                self._allocate(group, role, members)

    def _group_errors(self, group: dict[str, Any]) -> list[str]:
        blocks, out = group.get("blocks", 1), []
        known = [*self.defaults, "role", "blocks", "params", "constructed_lr"]
        for key in group.keys() - {*known, *OF_SCHEDULERS}:
            if likely := get_close_matches(key, known, n=1, cutoff=0.8):
                return [f"{key}={group[key]!r}: a group has no such setting; is {likely[0]} meant?"]
        if group.get("role") not in (None, *ROLES):
            return [f"role={group['role']!r}: must be one of {', '.join(ROLES)}"]
        if type(blocks) is not int or blocks < 1:
            return [f"blocks={blocks}: must be a whole number of at least 1"]
        for p in group["params"]:
            if p.dtype not in DTYPES or p.dtype != group["params"][0].dtype:
                out.append(f"parameter of dtype {p.dtype}: must be float32 or float64, the same in the whole group")
            elif hasattr(p, "device_mesh"):
                out.append("parameter is a DTensor: sharded parameters are not supported; use DistributedDataParallel")
            elif self._role(group, p) == "matrix" and p.dim() < 2:
                out.append(f"parameter of shape {tuple(p.shape)}: has the role of a matrix and is none")
            elif p.dim() and p.shape[0] % blocks:
                out.append(f"blocks={blocks}: does not divide the rows of shape {tuple(p.shape)}")
        return out

    def _role(self, group: dict[str, Any], p: Tensor) -> str:
        return group.get("role") or self.role_of(p)

    def _allocate(self, group: dict[str, Any], role: str, members: list[Tensor]) -> None:
        rule, blocks = self.rule(group, role), group.get("blocks", 1)
        gradients = [] if rule.correction is None else ["previous"]
        if gradients and not group.get("is_approx", True):
            gradients.append("upcoming")
        direction = rule.direction
        if isinstance(direction, MatrixDirection):
            self.ownership.assign(families(members, blocks), lambda p: direction.cost(*matrix_shape(p, blocks)))
        count = torch.zeros((), dtype=torch.float64, device=members[0].device)
        for p in members:
            steps = {"step": count} if direction.counts_steps else {}  # known to every rank
            if self.ownership.holds(p):
                zeros = {k: torch.zeros_like(p, memory_format=torch.contiguous_format) for k in gradients}
                self.state[p] = direction.state(p, blocks) | zeros | steps
            elif steps:
                self.state[p] = steps

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, parameters matched in the order of the groups, as torch does.

        Raises ValueError, with nothing changed, if another kind of optimizer made it, or if shapes differ.
        """
        try:
            super().load_state_dict(state_dict)
        except KeyError as error:
            raise ValueError(f"state_dict: has no {error}") from None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What unpickling calls, and torch's load_state_dict between its hooks, with new state and groups."""
        loaded = "defaults" not in state
        if loaded:
            self._refuse_foreign(state["state"], state["param_groups"])
        super().__setstate__(state)
        for group in self.param_groups:
            for key in self.settings.added_later:
                group.setdefault(key, self.defaults[key])
        if loaded:
            owned = ((p, s) for p, s in self.state.items() if p in self.ownership.owner)
            self._calls = {p: int(s["step"]) for p, s in owned if "step" in s}
            self._share_counts()

    def _share_counts(self) -> None:
        """Let parameters of a group and role with equal step counts share one tensor on their device."""
        for group in self.param_groups:
            for role in ROLES:
                shared: dict[float, Tensor] = {}
                for p in group["params"]:
                    if self._role(group, p) == role and "step" in (state := self.state.get(p, {})):
                        state["step"] = shared.setdefault(float(state["step"]), state["step"].to(p.device))

    def _refuse_foreign(self, loaded: dict[Any, State], groups: list[dict[str, Any]]) -> None:
        for number, p in enumerate(p for g in self.param_groups for p in g["params"]):
            present, saved = self.state.get(p, {}), loaded.get(p, {})
            if bool(present) != bool(saved):
                raise ValueError("state_dict: its state is that of other parameters")
            if present.keys() != saved.keys():
                raise ValueError(f"state_dict: parameter {number} has {sorted(saved)}, expected {sorted(present)}")
            for key, t in present.items():
                if t.shape != torch.as_tensor(saved[key]).shape:
                    raise ValueError(f"state_dict: {key} of parameter {number} has another shape than {tuple(t.shape)}")
        known = self.settings().as_group().keys() - self.settings.added_later
        for saved_group in groups:
            if missing := sorted(known - saved_group.keys()):
                name = type(self).__name__
                raise ValueError(f"state_dict: a group has no {', '.join(missing)}; it is not a {name}'s")

    def _follow_parameters(self) -> None:
        """Convert the state of parameters that `model.double()` or `model.to(device)` has converted.

        Raises ValueError if a parameter has a dtype now that it could not have been added with.
        """
        first = ((p, next((t for key, t in state.items() if key != "step"), None)) for p, state in self.state.items())
        moved = [p for p, t in first if t is not None and _differs(t, p)]
        if not moved:
            return
        if errors := {error: None for group in self.param_groups for error in self._group_errors(group)}:
            raise ValueError(f"{type(self).__name__}: {'; '.join(errors)}")
        for p in moved:
            self.state[p] |= {key: t.to(p.device, p.dtype) for key, t in self.state[p].items() if key != "step"}
        self._share_counts()

    # ---- the exact form

    @property
    def needs_lookahead(self) -> bool:
        """Whether the loop has to evaluate the next batch before each step (the exact form)."""
        return any(not group.get("is_approx", True) for group in self.param_groups)

    @torch.no_grad()
    def update_previous_grad(self) -> None:
        """Exact form: keep the present gradients, those of the next batch; where one is not finite, 0.

        A parameter without a gradient keeps what it had.
        """
        self._follow_parameters()
        self._looked_ahead = []
        inverse = self._inverse_scale()
        self._ahead_had_scale = inverse is not None
        for p, state in self.state.items():
            if "upcoming" in state and p.grad is not None:
                torch.nan_to_num(p.grad, nan=0.0, posinf=0.0, neginf=0.0, out=state["upcoming"])
                if inverse is not None:
                    state["upcoming"].mul_(inverse)
                self._looked_ahead.append(state)

    @torch.no_grad()
    def update_last_grad(self) -> None:
        """Exact form: what was kept becomes the previous gradient of the next step. Otherwise does nothing."""
        for state in self._looked_ahead or ():
            state["previous"], state["upcoming"] = state["upcoming"], state["previous"]
        self._looked_ahead = None

    # ---- the step

    @torch.compiler.disable  # a step compiled as a whole would be wrong; `compiled` compiles its elementwise parts
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, bs: int | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        bs is accepted for loops written for the official MARS class and changes nothing.
        Raises ValueError for sparse, complex or half-precision gradients, for hyperparameters that have become
        impossible, and in the exact form without the next batch's gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow_parameters()
        jobs = [job for group in self.param_groups for job in self._jobs(group)]
        if not jobs:
            return loss
        inverse = self._inverse_scale()
        if inverse is not None and self._looked_ahead and not self._ahead_had_scale:
            raise ValueError("grad_scale: must be set before update_previous_grad(), too; GradScaler sets it later")
        for job in jobs:
            job.numbers = _gradient_numbers(job, inverse)
            self._clip(job)
        ok = self._all_finite(jobs)
        waiting = []
        for transfer in (t for job in jobs if job.is_matrix for t in self._start_matrices(job, ok)):
            if transfer.work is None:
                self._run(_move_all, transfer.updates, transfer.decay)
            else:
                waiting.append((transfer.work, transfer))
        for job in jobs:
            if not job.is_matrix:
                self._update_elementwise(job, ok)
        for work, transfer in waiting:
            work.wait()
            self._run(_move_all, transfer.updates, transfer.decay)
        return loss

    def _jobs(self, group: dict[str, Any]) -> Iterator["Job"]:
        """The parameters of a group that have a gradient, by rule and by step count."""
        if errors := self.settings.of(group).errors():
            raise ValueError(f"{type(self).__name__}: {'; '.join(errors)}")
        if not group.get("is_approx", True) and self._looked_ahead is None:
            raise ValueError(
                "is_approx=False: call update_previous_grad() with the next batch's gradient before step()"
            )
        for role in ROLES:
            params = [p for p in group["params"] if p.grad is not None and p.numel() and self._role(group, p) == role]
            if not params:
                continue
            _check_gradients(params)
            rule = self.rule(group, role)
            if not rule.direction.counts_steps:
                yield Job(rule, params, group, None)
                continue
            cohorts: dict[int, list[Tensor]] = {}
            for p in params:
                cohorts.setdefault(id(self.state[p]["step"]), []).append(p)
            sharers = Counter(id(s["step"]) for s in self.state.values() if "step" in s)
            for key, members in cohorts.items():
                count = self.state[members[0]]["step"]
                if sharers[key] > len(members):  # the others have no gradient now: their count stays behind
                    count = count.clone()
                    for p in members:
                        self.state[p]["step"] = count
                yield Job(rule, members, group, count)

    def _clip(self, job: "Job") -> None:
        """Find what scales each gradient that this rank works on to at most unit norm."""
        held = [p for p in job.params if self.ownership.holds(p)]
        job.factors = [None] * len(held)
        if not job.rule.clip or not held:
            return
        pieces = [self._cut((p.grad, self.state[p].get("previous"))) for p in held]
        flat = [x for p in pieces for x in p]
        # ranks must agree on the norms of what all of them update: compiled reductions may differ in the last bit
        if self._compiled and (job.is_matrix or self.ownership.size == 1):
            norms = list(torch._foreach_norm(self._run(_norms_of_rows, flat, job.numbers)))
        else:
            norms = _norms(flat, job.numbers)
        ends = list(accumulate(len(p) for p in pieces))
        per_tensor = [norms[end - len(p) : end] for end, p in zip(ends, pieces, strict=True)]
        job.norms = [n[0] if len(n) == 1 else norm_of(torch.stack(n)) for n in per_tensor]
        job.factors = list(clip_factors(torch.stack(job.norms)).unbind())

    def _all_finite(self, jobs: list["Job"]) -> Tensor:
        """0-d bool: whether this step is to be taken, from gradients alone, so that all ranks agree."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            return found_inf == 0
        known = [n for job in jobs if not job.is_matrix for n in job.norms]
        unclipped = [p for job in jobs if job.is_matrix or not job.norms for p in job.params]
        rest = [p.grad for p in unclipped if p.grad is not None]
        norms = known + ([total_norm(rest)] if rest else [])
        return torch.isfinite(torch.stack([n.double() for n in norms])).all()

    def _inverse_scale(self) -> Tensor | None:
        scale = getattr(self, "grad_scale", None)
        return None if scale is None else scale.reciprocal().nan_to_num(nan=0.0)

    def _step_numbers(self, job: "Job", ok: Tensor) -> tuple[Step, Any]:
        """The step as its direction sees it, and the direction's numbers in the dtype of the parameters."""
        job.numbers = job.numbers._replace(take=ok.to(job.params[0].dtype))
        count = torch.ones((), dtype=torch.float64, device=ok.device)
        if job.count is not None:
            count = job.count.add_(ok).clamp(min=1)
        step = Step(ok.double(), count, job.rule.lr, job.rule.weight_decay)
        numbers: Any = job.rule.direction.numbers(step)
        return step, type(numbers)(*torch.stack([*numbers]).to(job.params[0].dtype).unbind())

    def _update_elementwise(self, job: "Job", ok: Tensor) -> None:
        direction = job.rule.direction
        step, numbers = self._step_numbers(job, ok)
        kernel = None if self._compiled else direction.cpu_kernel(step)
        keys, pieces = ("previous", *direction.state_names), []
        for p, factor in zip(job.params, job.factors, strict=True):
            pieces += [(factor, *piece) for piece in self._cut((p, p.grad, *map(self.state[p].get, keys)))]
        count = AT_ONCE if self._compiled else len(pieces)
        for i in range(0, len(pieces), count):
            some = pieces[i : i + count]
            self._run(_update_all, some, job.numbers, job.remember, direction.update, numbers, kernel)

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
        if function not in self._functions:
            self._functions[function] = torch.compile(function, dynamic=False, options=INDUCTOR)
        return self._functions[function](*arguments)

    def _start_matrices(self, job: "Job", ok: Tensor) -> Iterator["Transfer"]:
        """Directions of the matrices this rank owns, family by family of one shape.

        Each family's results travel to the other ranks while the next family is worked on. A rank that is alone yields
        the results of each batch by themselves, so that their memory is free before the next batch.
        """
        direction, blocks = job.rule.direction, job.group.get("blocks", 1)
        assert isinstance(direction, MatrixDirection)
        step, numbers = self._step_numbers(job, ok)
        dtype = direction.shared_dtype(job.params[0].device)
        factors = dict(zip(filter(self.ownership.holds, job.params), job.factors, strict=True))
        parts: list[tuple[list[Tensor], list[list[Tensor]]]] = []  # matrices that travel together, and their batches
        for family in families(job.params, blocks):
            batches = _batches([p for p in family if p in factors], self._calls)
            parts += [(batch, [batch]) for batch in batches] if self.ownership.size == 1 else [(family, batches)]
        rates: dict[float, Tensor] = {}
        for part, batches in parts:
            results: dict[Tensor, Tensor] = {}
            for batch in batches:
                found = self._directions(job, batch, [factors[p] for p in batch], step, numbers)
                results |= zip(batch, found.split(blocks), strict=True)
            shape = as_wide_matrices(part[0], blocks).shape
            work, shared = self.ownership.gather(part, results, shape, dtype)
            updates = []
            for p, result in zip(part, shared, strict=True):
                if p.grad is not None and result is not None:
                    scale = direction.scale(*matrix_shape(p, blocks))
                    if scale not in rates:
                        rates[scale] = numbers.rate * scale
                    updates.append((p, from_wide_matrices(result, p, blocks), rates[scale]))
            yield Transfer(work, updates, numbers.decay)

    def _directions(
        self, job: "Job", batch: list[Tensor], factors: list[Tensor | None], step: Step, numbers: Any
    ) -> Tensor:
        """Directions of matrices of one shape and one number of calls, (blocks of all of them, m, n) with m <= n."""
        direction, blocks = job.rule.direction, job.group.get("blocks", 1)
        assert isinstance(direction, MatrixDirection)
        index = self._calls.get(batch[0], 0) + 1
        self._calls |= dict.fromkeys(batch, index)
        gathered = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in batch]
        pieces = []
        for p, factor, out in zip(batch, factors, gathered, strict=True):
            averages = [self.state[p].get(k) for k in ("previous", *direction.state_names)]
            pieces += [(factor, *piece) for piece in self._cut((out, p.grad, *averages))]
        self._run(_accumulate_all, pieces, job.numbers, job.remember, direction.accumulate, numbers)
        wide = [as_wide_matrices(x, blocks) for x in gathered]
        stack = torch.cat(wide) if len(wide) > 1 else wide[0]
        return direction.directions(stack, [self.state[p] for p in batch], replace(step, index=index))


@dataclass
class Transfer:
    """Directions of matrices on their way between ranks, and the weights they will move."""

    work: torch.distributed.Work | None  # None: nothing to wait for
    updates: list[tuple[Tensor, Tensor, Tensor]]  # weight, direction, rate
    decay: Tensor


@dataclass
class Job:
    """One rule at work: parameters of one role in one group, of one step count, that have a gradient."""

    rule: Rule
    params: list[Tensor]
    group: dict[str, Any]
    count: Tensor | None  # steps taken, 0-d; None if the direction does not count them
    norms: list[Tensor] = field(default_factory=list)  # of the gradients that are clipped
    factors: list[Tensor | None] = field(default_factory=list)  # for clipping, of the parameters this rank holds
    numbers: GradientNumbers = field(init=False)

    @property
    def is_matrix(self) -> bool:
        return isinstance(self.rule.direction, MatrixDirection)

    @property
    def remember(self) -> bool:
        """Whether this step's gradient is the next one's previous gradient (the approximate form)."""
        return self.rule.correction is not None and self.group.get("is_approx", True)


def _gradient_numbers(job: Job, inverse: Tensor | None) -> GradientNumbers:
    like, weight = job.params[0], None
    if job.rule.correction is not None:
        weight = torch.full((), correction_weight(*job.rule.correction), dtype=like.dtype, device=like.device)
    take = torch.ones((), dtype=like.dtype, device=like.device)
    return GradientNumbers(take, None if inverse is None else inverse.to(like.dtype), weight)


def _differs(t: Tensor, p: Tensor) -> bool:
    return t.dtype is not p.dtype or t.get_device() != p.get_device()  # quick, for it runs in every step


def _check_gradients(params: list[Tensor]) -> None:
    for p in params:
        g = p.grad
        if g is not None and (g.is_sparse or g.dtype not in DTYPES):
            kind = "sparse" if g.is_sparse else str(g.dtype)
            raise ValueError(
                f"gradient of a parameter of shape {tuple(p.shape)} is {kind}: must be dense and float32 or float64; "
                "for embeddings set sparse=False, for lower precision keep the weights in float32 and use autocast"
            )


def _batches(params: list[Tensor], calls: dict[Tensor, int]) -> list[list[Tensor]]:
    """The matrices that are orthogonalized together, all of one number of calls.

    On a GPU these are as many as memory allows. On a CPU each is alone, which is as fast and needs less memory; the
    results then do not depend on which matrices a rank owns.
    """
    if not params:
        return []
    count = max(1, BATCH // params[0].numel()) if params[0].device.type == "cuda" else 1
    alike: dict[int, list[Tensor]] = {}
    for p in params:
        alike.setdefault(calls.get(p, 0), []).append(p)
    return [members[i : i + count] for members in alike.values() for i in range(0, len(members), count)]


# ---- functions over lists of tensors, plain or compiled


def _norms(pieces: list[tuple], numbers: GradientNumbers) -> list[Tensor]:
    return [corrected_norm(grad, previous, numbers, scratch) for grad, previous, scratch in pieces]


def _norms_of_rows(pieces: list[tuple], numbers: GradientNumbers) -> list[Tensor]:
    """For the compiler: it sums the rows of many matrices in one kernel, and whole matrices in a kernel each."""
    return [corrected_norm(grad, previous, numbers, scratch, norms_of_rows) for grad, previous, scratch in pieces]


def _update_all(
    pieces: list[tuple], g: GradientNumbers, remember: bool, update: Callable, n: Any, kernel: Callable | None
) -> None:
    for factor, p, grad, previous, *state, scratch in pieces:
        gradient = clipped_gradient(grad, previous, factor, g, remember, scratch)
        if kernel is not None and scratch[0] is not None:  # a block of contiguous tensors on a CPU
            kernel(p, gradient, state)
        else:
            update(p, gradient, state, n, scratch[0])


def _accumulate_all(pieces: list[tuple], g: GradientNumbers, remember: bool, accumulate: Callable, n: Any) -> None:
    for factor, out, grad, previous, *state, scratch in pieces:
        accumulate(clipped_gradient(grad, previous, factor, g, remember, scratch), state, n, out)


def _move_all(updates: list[tuple[Tensor, Tensor, Tensor]], decay: Tensor) -> None:
    for p, direction, rate in updates:
        p.mul_(decay).addcmul_(direction.to(p.dtype), rate, value=-1)
