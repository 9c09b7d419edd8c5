"""Proving a plan: all ranks of it in one process, on small inputs, against the whole model.

Each rank is a copy of the model with the plan applied, run by a thread of its own; a sum over ranks is a
meeting of the threads. So a rank that would hang, fail or differ is found before any real rank depends on
it, and one process decides for all.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .apply import apply_plan
from .inputs import Example
from .multihead import restore_forward
from .proof import proof_copy
from .shardplan import ShardPlan
from .surrogate import make_surrogate
from .trace.hooks import answer_tensors, result_tensors

TOLERANCE = 3e-4  # largest difference over largest value, fp32


class RankFailedError(Exception):
    """Another rank failed before this collective."""


class RanksDisagreeError(Exception):
    """Ranks bring different shapes to a collective, or one of them does not come."""


class _Meeting:
    """Where the threads of all ranks exchange tensors. No clock: who waits is told when somebody left."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.changed = threading.Condition()
        self.arrived: dict[int, Tensor] = {}
        self.every: list[Tensor] = []
        self.meetings = 0
        self.left = 0
        self.failed = False

    def leave(self, failed: bool) -> None:
        """A rank comes to no more meetings."""
        with self.changed:
            self.left += 1
            self.failed |= failed
            self.changed.notify_all()

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        """Every rank's x."""
        with self.changed:
            number = self.meetings
            self.arrived[rank] = x
            if len(self.arrived) == self.world_size:
                self.every = [self.arrived[r] for r in range(self.world_size)]
                self.arrived = {}
                self.meetings += 1
                self.changed.notify_all()
            else:
                self.changed.wait_for(lambda: self.meetings > number or self.left)
            if self.meetings == number:
                if self.failed:
                    raise RankFailedError("another rank failed")
                raise RanksDisagreeError("ranks pass different numbers of collectives")
            every = self.every
        if len({tuple(t.shape) for t in every}) > 1:
            raise RanksDisagreeError(
                f"ranks bring shapes {[tuple(t.shape) for t in every]} to one collective"
            )
        return every


class ThreadCommunicator:
    """The collectives of one rank among threads."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self.meeting, self.rank, self.world_size = meeting, rank, meeting.world_size

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x."""
        every = self.meeting.exchange(self.rank, x)
        total = every[0].clone()
        for other in every[1:]:
            total += other
        return total

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x, stacked."""
        return torch.stack(self.meeting.exchange(self.rank, x))


@dataclass(frozen=True)
class Mismatch:
    """module: where ranks first differ from the whole model ("" is the model's result). what: how."""

    module: str
    what: str


def simulate(model: nn.Module, plan: ShardPlan, example: Example, whole_results: set[str]) -> Mismatch | None:
    """Run the plan's ranks on one example; None where every rank agrees with the whole model.

    whole_results: modules whose results are the same on all ranks, to find the first that differs.
    """
    base, fitted = proof_copy(model, plan, example, shorten=True)
    if fitted is not plan:
        with suppress(Exception):  # forward may know the vocabulary's size by other means
            if _simulate(base, fitted, example, whole_results) is None:
                return None
        base, _ = proof_copy(model, plan, example, shorten=False)
    return _simulate(base, plan, example, whole_results)


def _simulate(
    model: nn.Module, plan: ShardPlan, example: Example, whole_results: set[str]
) -> Mismatch | None:
    reference = make_surrogate(model).model
    for module in reference.modules():
        restore_forward(module)
    try:
        wanted, log = _run(reference, example, whole_results, None)
    except Exception as error:  # noqa: BLE001  (a model of more layers may need larger inputs than its copy)
        return Mismatch("", f"the whole model fails on the example ({type(error).__name__}: {error})"[:200])
    if not wanted:
        return Mismatch("", "the whole model returns no tensor that could be compared")
    if not proves(wanted):
        return Mismatch("", "the whole model's results are zero or not finite, which proves nothing")
    del reference
    meeting = _Meeting(plan.world_size)
    outcomes: list[Mismatch | None] = [None] * plan.world_size

    def rank_body(rank: int) -> None:
        torch.set_num_threads(1)
        local = make_surrogate(model).model
        checker = _Checker(log)
        try:
            apply_plan(local, plan, ThreadCommunicator(meeting, rank))
            got, _ = _run(local, example, whole_results, checker)
            outcomes[rank] = checker.first or compare(got, wanted)
        except RankFailedError:
            outcomes[rank] = checker.first
        except RanksDisagreeError as error:
            outcomes[rank] = checker.first or Mismatch(checker.where, str(error))
        except Exception as error:  # noqa: BLE001  (a user's model may raise anything; its place is the finding)
            outcomes[rank] = checker.first or Mismatch(checker.where, f"{type(error).__name__}: {error}")
        finally:
            meeting.leave(outcomes[rank] is not None)

    threads = [
        threading.Thread(target=rank_body, args=(rank,), daemon=True) for rank in range(plan.world_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return next((outcome for outcome in outcomes if outcome is not None), None)


def proves(results: list[Tensor]) -> bool:
    """Whether most values of the first floating result are finite and some are not zero."""
    first = next((r for r in results if r.is_floating_point()), None)
    if first is None:
        return True
    finite = first.isfinite()
    return bool(first[finite].any()) and 2 * int(finite.sum()) > first.numel()


def compare(got: list[Tensor], wanted: list[Tensor]) -> Mismatch | None:
    """The results of a rank against the whole model's."""
    if len(got) != len(wanted):
        return Mismatch("", f"{len(got)} results instead of {len(wanted)}")
    for one, other in zip(got, wanted, strict=True):
        if one.shape != other.shape:
            return Mismatch("", f"a result of shape {tuple(one.shape)} instead of {tuple(other.shape)}")
        if differs(one, other):
            return Mismatch("", f"results differ by {_largest(one, other):.2g} of their largest value")
    return None


def differs(one: Tensor, other: Tensor) -> bool:
    """Whether two results differ by more than rounding; equal infinities and NaN at the same place do not."""
    if not other.is_floating_point():
        return not torch.equal(one, other)
    return not _largest(one, other) <= TOLERANCE


def _largest(one: Tensor, other: Tensor) -> float:
    one, other = one.float(), other.float()
    fine = (one == other) | (one.isnan() & other.isnan())
    gap = torch.where(fine, 0.0, (one - other).abs())
    scale = torch.where(other.isfinite(), other.abs(), 0.0).max() if other.numel() else torch.tensor(0.0)
    return float(gap.max() / scale.clamp_min(1e-9)) if gap.numel() else 0.0


class _Checker:
    """Compares the modules of one rank with the whole model's while they run."""

    def __init__(self, log: dict[str, list[Tensor]]) -> None:
        self.log = log
        self.calls: dict[str, int] = {}
        self.stack: list[str] = []
        self.first: Mismatch | None = None

    @property
    def where(self) -> str:
        """The innermost running module."""
        return self.stack[-1] if self.stack else ""

    def check(self, name: str, tensor: Tensor) -> None:
        """Compare one result."""
        place = self.calls.get(name, 0)
        self.calls[name] = place + 1
        known = self.log.get(name, [])
        if (
            self.first is None
            and place < len(known)
            and (known[place].shape != tensor.shape or differs(tensor, known[place]))
        ):
            self.first = Mismatch(name, "its result differs from the whole model's")


def _run(
    model: nn.Module, example: Example, whole_results: set[str], checker: _Checker | None
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """(all result tensors, results of the watched modules)."""
    log: dict[str, list[Tensor]] = {}

    def enter(name: str) -> Any:
        return lambda *_: checker.stack.append(name) if checker is not None else None

    def leave(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            tensors = [t for _, t in result_tensors(out) if t.is_floating_point()]
            if checker is not None:
                checker.stack.pop()
                if name in whole_results and tensors:
                    checker.check(name, tensors[0])
            elif name in whole_results and tensors:
                log.setdefault(name, []).append(tensors[0].clone())

        return hook

    for name, module in model.named_modules():
        module.register_forward_pre_hook(enter(name))
        module.register_forward_hook(leave(name))
    with torch.no_grad():
        results = [t for out in example.run(model) for t in answer_tensors(out)]
    return results, log
