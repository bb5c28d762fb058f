"""The base of every algorithm in this folder: a raw or variance-reduced gradient becomes an update by one rule."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .checks import check_gradients, check_groups, fitting_state, group_errors
from .cohorts import Cohort, advanced, at_once, chunks, parts_here, parts_of
from .cpu import update_of
from .directions import MatrixDirection, Step
from .elementwise import Runner, accumulate_all, move_all, norms_of_all, update_all
from .matrices import as_wide_matrices, families, from_wide_matrices, matrix_shape
from .owners import Owners, Replicated, Sharded
from .roles import ROLES
from .settings import Rule, Settings
from .shards import local, sharding_errors, sharding_of
from .signatures import with_arguments
from .variance_reduction import clip_factors, correction_weight, norms_from_rows

# torch.compiler.disable imports the compiler at once, which takes two seconds; this one waits for the first call
not_compiled = getattr(torch, "_disable_dynamo", torch.compiler.disable)
AT_ONCE = 10  # tensors in a compiled update: the compiler does not fuse operations that are more than 64 apart


class ComposedOptimizer(Optimizer):
    """Base of the algorithms. A subclass names its `settings`, whose `rule` says how each parameter is updated.

    Parameter groups may carry "role" ("matrix", "embedding" or "vector"); parameters of a group without one get
    their role from `role_of`. "blocks": n treats a matrix as n blocks of rows, each a matrix of its own.
    State is allocated when a parameter is added; of a frozen parameter, at its first step. Parameters may be sharded by
    `fully_shard`, which docs/sharded.md describes.

    Exact form (is_approx=False): the loop evaluates the next batch at the current parameters and calls
    `update_previous_grad()`, then evaluates the current batch and calls `step()` and `update_last_grad()`.

    As in torch's optimizers, a step never skips an update and never looks at the values of gradients. Whether they are
    finite is the caller's business; `torch.amp.GradScaler` unscales them and leaves out the steps in which they are
    not. Do not use it with the exact form: it unscales one gradient a step, and the exact form needs two.

    A subclass can spell its arguments in an `__init__`, so that editors and mypy see them. Their defaults may differ
    from those of a run. What each argument means is declared in the settings, and added to the subclass's docstring.
    Raises ValueError, naming key and value, for impossible hyperparameters, and TypeError for unknown ones.
    """

    settings: ClassVar[type[Settings]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if hasattr(cls, "settings"):
            cls.__doc__ = with_arguments(cls.__doc__, cls.settings)

    def __init__(
        self,
        params: ParamsT,
        lr: float | None = None,
        *,
        process_group: ProcessGroup | None = None,
        compiled: bool = False,
        **given: Any,
    ) -> None:
        given = given if lr is None else given | {"lr": lr}
        defaults = self.settings().as_group()
        if unknown := sorted(given.keys() - defaults.keys()):
            raise TypeError(f"{type(self).__name__} has no argument {', '.join(unknown)}")
        self.ownership = Owners() if process_group is None else Replicated(process_group)  # of whole parameters
        self._sharded = Sharded()
        self._run = Runner(compiled)
        self._looked_ahead = False  # exact form: whether the next batch's gradient is known
        super().__init__(params, defaults | given)

    def rule(self, group: dict[str, Any], role: str) -> Rule:
        """The rule for a parameter of this role in this group, with the group's present numbers."""
        settings = self.settings.of(group)
        constructed = float(group.get("constructed_lr", settings.lr))
        rule = settings.rule(role, settings.lr / constructed if constructed else 0.0)
        return replace(rule, cautious=getattr(settings, "weight_decay_kind", "decoupled") == "cautious")

    def rule_of(self, group: dict[str, Any], p: Tensor) -> Rule:
        """The rule for a parameter of this group."""
        return self.rule(group, self._role(group, p))

    def role_of(self, p: Tensor) -> str:
        """The role of a parameter whose group does not name a role.

        Convolution filters are matrices, flattened to (out, rest). The official MARS-M code orthogonalizes their 3x3
        slices instead, and its updates of filters are several times larger; its learning rates do not transfer.
        """
        return "matrix" if p.dim() >= 2 else "vector"

    def _role(self, group: dict[str, Any], p: Tensor) -> str:
        return group.get("role") or self.role_of(p)

    def __getstate__(self) -> dict[str, Any]:
        ours = ("ownership", "_sharded", "_run", "_looked_ahead")
        return super().__getstate__() | {key: getattr(self, key) for key in ours}

    # ---- parameters and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and allocate its state. Raises ValueError for bad hyperparameters or parameters."""
        super().add_param_group(dict(param_group))  # a copy, so that the caller's dict can serve another optimizer
        group = self.param_groups[-1]
        errors = self.settings.of(group).errors() + self._errors(group)
        if errors:
            self.param_groups.pop()
            raise ValueError(f"{type(self).__name__}: {'; '.join(dict.fromkeys(errors))}")
        group["constructed_lr"] = float(self.defaults["lr"])
        self._allocate(group, [p for p in group["params"] if p.requires_grad])

    def _errors(self, group: dict[str, Any]) -> list[str]:
        errors = sharding_errors(group["params"], self._sharded.first, isinstance(self.ownership, Replicated))
        return errors or group_errors(group, self.defaults, lambda p: self._role(group, p))

    def _allocate(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Create the state of parameters of a group. Every rank counts the steps; shards and owners have the rest."""
        for p in filter(sharding_of, params):
            self._sharded.add(p)
        blocks = group.get("blocks", 1)
        for rule, owners, members in self._by_role(group, params):
            direction = rule.direction
            names = rule.state_names(exact=not group.get("is_approx", True))
            if isinstance(direction, MatrixDirection):
                costs = {p: direction.cost(*matrix_shape(p, blocks)) for p in members}
                owners.assign(families(members, blocks), costs.__getitem__)
            for p in members:
                state = {"step": torch.zeros(())} if direction.counts_steps else {}
                if owners.holds(p):
                    state |= {name: torch.zeros_like(p, memory_format=torch.contiguous_format) for name in names}
                if owners.owns(p):
                    state |= direction.owner_state(local(p).new_empty(()).expand(p.shape), blocks)
                self.state[p] = state

    def owners_of(self, p: Tensor) -> Owners:
        """Who works on a parameter."""
        return self._sharded if p in self._sharded.shapes else self.ownership

    def _by_role(self, group: dict[str, Any], params: list[Tensor]) -> Iterator[tuple[Rule, Owners, list[Tensor]]]:
        kinds: dict[tuple[str, Owners], list[Tensor]] = {}
        for p in params:
            kinds.setdefault((self._role(group, p), self.owners_of(p)), []).append(p)
        for (role, owners), members in sorted(kinds.items(), key=lambda kind: ROLES.index(kind[0][0])):
            yield self.rule(group, role), owners, members

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer of torch: state and groups, parameters by their number."""
        self._follow_parameters()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, parameters matched in the order of the groups, as torch does.

        Raises ValueError, with nothing changed, if another kind of optimizer made it, or if shapes differ.
        """
        self._follow_parameters()
        try:
            super().load_state_dict(state_dict)
        except KeyError as error:
            raise ValueError(f"state_dict: has no {error}") from None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What unpickling calls, and torch's load_state_dict between its hooks, with new state and groups."""
        loaded = "defaults" not in state
        if loaded:
            fitting = fitting_state(self, state["state"], lambda p: self.owners_of(p).owns(p))
            check_groups(self, state["param_groups"], self.settings().as_group())
            state = state | {"state": fitting}
        super().__setstate__(state)
        for s in self.state.values() if loaded else ():
            if "step" in s:  # on the CPU, and of this parameter alone
                s["step"] = torch.tensor(float(s["step"]))

    def _follow_parameters(self) -> None:
        """Make the state fit the parameters that the groups have now.

        `model.double()` and `model.to(device)` convert parameters, a frozen one may have become trainable, and
        Accelerate puts shards in the place of parameters. Raises ValueError for what could not have been added.
        """
        groups = self.param_groups
        missing = [
            [p for p in g["params"] if p not in self.state and (p.requires_grad or p.grad is not None)] for g in groups
        ]
        tensors = ((p, next((t for key, t in s.items() if key != "step"), p)) for p, s in self.state.items())
        moved = [p for p, t in tensors if t.dtype is not p.dtype or t.get_device() != p.get_device()]
        if not moved and not any(missing):
            return
        if errors := {error: None for group in groups for error in self._errors(group)}:
            raise ValueError(f"{type(self).__name__}: {'; '.join(errors)}")
        for p in moved:
            self.state[p] |= {key: t.to(p.device, p.dtype) for key, t in self.state[p].items() if key != "step"}
        for group, params in zip(groups, missing, strict=True):
            self._allocate(group, params)
        for p in self.state.keys() - {p for group in groups for p in group["params"]}:
            del self.state[p]

    # ---- the exact form

    @property
    def needs_lookahead(self) -> bool:
        """Whether the loop has to evaluate the next batch before each step (the exact form)."""
        return any(not group.get("is_approx", True) for group in self.param_groups)

    @torch.no_grad()
    def update_previous_grad(self) -> None:
        """Exact form: keep the present gradients, those of the next batch; a parameter without one keeps the last."""
        self._follow_parameters()
        check_gradients(list(self.state))
        self._looked_ahead = True
        for p, state in self.state.items():
            if "upcoming" in state:
                local(state["upcoming"]).copy_(local(state["previous"] if p.grad is None else p.grad))

    @torch.no_grad()
    def update_last_grad(self) -> None:
        """Exact form: what was kept becomes the previous gradient of the next step. Otherwise does nothing."""
        for state in self.state.values() if self._looked_ahead else ():
            if "upcoming" in state:
                state["previous"], state["upcoming"] = state["upcoming"], state["previous"]
        self._looked_ahead = False

    # ---- the step

    @not_compiled  # a step compiled as a whole would be wrong; `compiled` compiles its elementwise parts
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
        cohorts = [cohort for group in self.param_groups for cohort in self._cohorts(group)]
        self._find_factors([cohort for cohort in cohorts if cohort.rule.clip])
        if counts := [self.state[p]["step"] for c in cohorts if c.direction.counts_steps for p in c.params]:
            torch._foreach_add_(counts, 1)
        moves = advanced(self._move_matrices(c, part) for c in cohorts if c.is_matrix for part in parts_of(c))
        for cohort in cohorts:
            if not cohort.is_matrix:
                self._update_elementwise(cohort)
        while moves:
            moves = advanced(moves)
        return loss

    def _cohorts(self, group: dict[str, Any]) -> Iterator[Cohort]:
        """The parameters of a group that have a gradient, by rule and by step count."""
        if errors := self.settings.of(group).errors():
            raise ValueError(f"{type(self).__name__}: {'; '.join(errors)}")
        if not group.get("is_approx", True) and not self._looked_ahead:
            raise ValueError(
                "is_approx=False: call update_previous_grad() with the next batch's gradient before step()"
            )
        with_gradient = [p for p in group["params"] if p.grad is not None and p.numel()]
        check_gradients(with_gradient)
        for rule, owners, params in self._by_role(group, with_gradient):
            by_count: dict[int, list[Tensor]] = {}
            for p in params:
                count = int(self.state[p]["step"]) + 1 if rule.direction.counts_steps else 1
                by_count.setdefault(count, []).append(p)
            weight = rule.correction and self._run.number(correction_weight(*rule.correction), params[0].dtype)
            remember = rule.correction is not None and group.get("is_approx", True)
            amount = self._run.number(rule.lr * rule.weight_decay, params[0].dtype) if rule.cautious else None
            for count, members in by_count.items():
                step = Step(count, rule.lr, 0.0 if rule.cautious else rule.weight_decay)
                yield Cohort(rule, owners, members, step, weight, remember, group.get("blocks", 1), amount)

    def _find_factors(self, cohorts: list[Cohort]) -> None:
        """Find what clips each gradient. Raises ValueError if ranks differ in which sharded parameters have one."""
        norms: dict[Tensor, Tensor] = {}
        for cohort in cohorts:
            params = [p for p in parts_here(cohort.params) if cohort.owners.holds(p)]
            pieces = [(local(p.grad), local(self.state[p].get("previous"))) for p in params]
            # ranks must agree on the norms of what all of them update: compiled reductions may differ in the last bit
            eager = cohort.owners.size > 1 and not (cohort.is_matrix and cohort.owners is self.ownership)
            if pieces:
                rows = self._run(norms_of_all, pieces, cohort.weight, eager=eager)
                norms |= zip(params, norms_from_rows(rows), strict=True)
        if self._sharded.shapes:
            norms |= self._sharded.total_norms(norms)
        for cohort in cohorts:
            if params := [p for p in cohort.params if p in norms]:
                factors = clip_factors(torch.stack([norms[p] for p in params]), cohort.dtype)
                cohort.factors.update(zip(params, factors, strict=True))

    def _pieces(self, cohort: Cohort, targets: dict[Tensor, Tensor]) -> list[tuple]:
        """Clip factor, target, gradient, previous gradient and state of each parameter: what this rank holds."""
        names = ("previous", *cohort.direction.state_names)
        return [
            (cohort.factors.get(p), target, local(p.grad), *(local(state.get(name)) for name in names))
            for p, target in targets.items()
            for state in (self.state[p],)
        ]

    def _update_elementwise(self, cohort: Cohort) -> None:
        numbers = self._run.numbers(cohort.numbers, cohort.dtype)
        pieces = self._pieces(cohort, parts_here(cohort.params))
        update = cohort.direction.update if self._run.compiled else update_of(cohort.direction, cohort.step)
        for some in chunks(pieces, AT_ONCE if self._run.compiled else max(1, len(pieces))):
            self._run(update_all, some, cohort.weight, cohort.remember, update, numbers, cohort.cautious)

    def _move_matrices(self, cohort: Cohort, part: list[Tensor]) -> Generator[None, None, None]:
        """Move matrices of one shape by their directions. Pauses while inputs or results travel between ranks."""
        direction, owners, blocks = cohort.direction, cohort.owners, cohort.blocks
        dtype = direction.shared_dtype(part[0])
        travels = dtype if dtype.itemsize < 4 else part[0].dtype  # float64 stays, as for a process that is alone
        inputs = yield from owners.collect(part, partial(self._inputs, cohort), travels)
        results: dict[Tensor, Tensor] = {}
        for batch in chunks([p for p in part if owners.owns(p)], at_once(part[0])):
            results |= self._directions(cohort, batch, inputs(batch))
        updates = yield from owners.share(part, results, dtype)
        scales = {p: direction.scale(*matrix_shape(p, blocks)) for p in part}
        rates = {scale: self._run.number(cohort.numbers.rate * scale, cohort.dtype) for scale in scales.values()}
        moved = [(here, updates[p], rates[scales[p]]) for p, here in parts_here(part).items()]
        self._run(move_all, moved, self._run.number(cohort.numbers.decay, cohort.dtype), cohort.cautious)

    def _inputs(self, cohort: Cohort, params: list[Tensor]) -> list[Tensor]:
        """What the directions of matrices are made from, in the shapes that this rank holds."""
        numbers = self._run.numbers(cohort.numbers, cohort.dtype)
        out = {p: torch.empty_like(local(p), memory_format=torch.contiguous_format) for p in params}
        if pieces := self._pieces(cohort, {p: x for p, x in out.items() if x.numel()}):
            self._run(accumulate_all, pieces, cohort.weight, cohort.remember, cohort.direction.accumulate, numbers)
        return list(out.values())

    def _directions(self, cohort: Cohort, batch: list[Tensor], inputs: list[Tensor]) -> dict[Tensor, Tensor]:
        """The directions of whole matrices of one shape, in the shapes of their parameters."""
        wide = [as_wide_matrices(x, cohort.blocks) for x in inputs]
        stack = torch.cat(wide) if len(wide) > 1 else wide[0]
        found = cohort.direction.directions(stack, [self.state[p] for p in batch], cohort.step).split(cohort.blocks)
        return {p: from_wide_matrices(x, p, cohort.blocks) for p, x in zip(batch, found, strict=True)}
