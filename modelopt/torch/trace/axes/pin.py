"""Freezes what the model's own arithmetic can never let go, so that it is explained as frozen instead of chosen and given back.

self.head_dim == width of q.k (kept)   and   self.head_dim == width of v   ->   the width of v is kept, for the same reason
"""

from __future__ import annotations

from collections.abc import Iterable

from modelopt.torch.trace.axes.expr import Attr, Equation, Expr, Size, leaves, show
from modelopt.torch.trace.axes.labels import EMPTY, LabelStore

_HARD = ""
Pinned = dict[Attr, tuple[str, Equation]]  # soft reason, what fixed it


def freeze_pinned(store: LabelStore, equations: Iterable[Equation]) -> None:
    """Freeze every size that equations tie to a constant or to a frozen size; where that one is soft, so is this."""
    equal = [e for e in equations if e.relation == "=="]
    pinned: Pinned = {}
    while _spread(store, equal, pinned):
        pass


def _spread(store: LabelStore, equations: list[Equation], pinned: Pinned) -> bool:
    """One pass over the equations; True if something new was pinned."""
    new = False
    for equation in equations:
        for one, other in ((equation.left, equation.right), (equation.right, equation.left)):
            soft = _fixed(store, other, pinned)
            if soft is None:
                continue
            if isinstance(one, Attr) and (one not in pinned or (pinned[one][0] and not soft)):
                pinned[one], new = (soft, equation), True
            elif type(one) is Size and _fixed(store, one, pinned) is None:
                text = f"{show(equation.left)} == {show(equation.right)} ({equation.what}) leaves no choice"
                causes = [f"; {a} is fixed by {pinned[a][1]}" for a in leaves(other) if isinstance(a, Attr)]
                text += "".join(dict.fromkeys(causes))
                site = ("", "", str(equation.where))
                store.site = lambda site=site: site  # type: ignore[misc]
                store.freeze_ids(one.axis.ids[one.start : one.stop], text, soft or None)
                new = True
    return new


def _fixed(store: LabelStore, expr: Expr, pinned: Pinned) -> str | None:
    """The soft reason ("" for a hard one) for which an expression cannot change; None if it can."""
    reasons = []
    for leaf in leaves(expr):
        if isinstance(leaf, Attr):
            reason = pinned[leaf][0] if leaf in pinned else None
        elif type(leaf) is Size:
            ids = store.resolve_ids(leaf.axis.ids[leaf.start : leaf.stop])
            free = bool((ids != EMPTY).any())
            reason = None if free else store.explain(int(leaf.axis.ids[leaf.start])).soft or _HARD
        else:
            return None
        if reason is None:
            return None
        reasons.append(reason)
    return next((r for r in reasons if r), _HARD)
