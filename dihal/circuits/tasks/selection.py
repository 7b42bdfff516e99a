"""Which pairs are used, and in which order their answers are revealed: what only a model can say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dihal.circuits.metrics import solved
from dihal.circuits.tasks.base import SPLITS, Task
from dihal.circuits.types import PairBatch
from dihal.errors import UsageError

__all__ = ["LogitsOf", "jointly_solved", "reveal_orders", "solved_ids"]

LogitsOf = Callable[[PairBatch], Float[Tensor, "batch targets vocab"]]
"""Logits of the clean prompts at the targets."""

Solves = Callable[[Float[Tensor, "batch targets vocab"], PairBatch], Tensor]


def solved_ids(
    task: Task, logits_of: LogitsOf, n: int, *, seed: int = 0, split: str = "discovery", by: Solves = solved
) -> list[int]:
    """Ids of the first `n` pairs that a model solves, at every looked-at state of the trajectory."""
    verdict: dict[int, bool] = {}
    for batch in task.pairs(n, seed=seed, split=split):
        for sample, right in zip(batch.ids.tolist(), by(logits_of(batch), batch).tolist(), strict=True):
            verdict[sample] = verdict.get(sample, True) and right
    return sorted(sample for sample, right in verdict.items() if right)


def jointly_solved(
    tasks: Sequence[Task],
    models: Sequence[LogitsOf],
    n: dict[str, int],
    *,
    pool: int,
    seed: int = 0,
    by: Solves = solved,
) -> list[Task]:
    """The tasks restricted to pairs that *every* model solves.

    Args:
        tasks: one task as each model sees it (`Task.for_model`).
        models: per task the model's logits of the clean prompts.
        n: split -> pairs wanted.
        pool: pairs tried per split.
        seed: seed of the pairs.
        by: what counts as solved.

    Raises:
        UsageError: some model, or all together, solve too few: the message says how many each solves.
    """
    chosen, pools = {}, {}
    for split in SPLITS:
        if not n.get(split):
            continue
        found = [set(solved_ids(t, model, pool, seed=seed, split=split, by=by)) for t, model in zip(tasks, models)]
        both = sorted(set.intersection(*found))
        if len(both) < n[split]:
            counts = ", ".join(str(len(ids)) for ids in found)
            raise UsageError(
                f"of {pool} {split} pairs of {tasks[0].name!r} the models solve {counts}, and {len(both)} together; "
                f"{n[split]} are needed. This task cannot be compared here: choose an easier one, or a larger pool."
            )
        chosen[split] = both[: n[split]]
        pools[split] = {"pairs": pool, "solved": [len(ids) for ids in found], "together": len(both)}
    return [task.restricted(chosen, pools) for task in tasks]


def reveal_orders(
    task: Task, logits_of: LogitsOf, n: int, *, seed: int = 0, split: str = "discovery"
) -> dict[int, tuple[int, ...]]:
    """Reveal order of each pair's answer: at every step of a clean run the most confident masked token comes next.

    The revealed token is the answer's own (teacher-forced), so that all models see the same trajectory.

    Args:
        task: a task under a `full` view.
        logits_of: the model's logits of the clean prompts at the targets.
        n: pairs.
        seed: seed of the pairs.
        split: split of the pairs.

    Raises:
        UsageError: the task's view is not `full`.
    """
    view = task.view
    if view.attention != "full" or view.mask_id is None:
        raise UsageError("a reveal order needs a masked diffusion model's view: attention 'full' with its mask_id.")
    orders = {}
    for sample, pair in task.encoded(n, seed=seed, split=split).items():
        hidden, order = list(range(len(pair.slot))), []
        while hidden:
            masked = {pair.slot[i] for i in hidden}
            ids = torch.tensor([[view.mask_id if at in masked else token for at, token in enumerate(pair.clean)]])
            read = torch.tensor([[pair.slot[i] - int(view.shift) for i in hidden]])
            right = torch.tensor([[[pair.answers[i][0]] for i in hidden]])
            batch = PairBatch(
                clean=ids,
                corrupted=ids,
                positions=read,
                answers=right,
                foils=right,
                weights=torch.full(read.shape, 1.0 / len(hidden)),
                attention=task.attention,
                ids=torch.tensor([sample]),
            )
            confidence = logits_of(batch)[0].softmax(-1).amax(-1)
            order.append(hidden.pop(int(confidence.argmax())))
        orders[sample] = tuple(order)
    return orders
