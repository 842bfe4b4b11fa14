"""Weights that give terms the shares of the gradient that a group asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from stillroom.config import TERMS, Objective
from stillroom.errors import UserError


def has_shares(objective: Objective) -> bool:
    """Whether the weight of a term must be found."""
    return bool(_shares(objective))


def with_found_weights(objective: Objective, norms: Sequence[Mapping[str, float]], steps: int) -> Objective:
    """The objective with the weights of its shares, from norms of each term's gradient measured with its own weights.

    With n̄ the mean of a term's norms, and R the sum of those of the terms that keep their weights, a term with share s
    gets s / (1 − Σ s) · R / n̄: its weighted norm is s of the sum of all. Steps with a norm that is not finite are left
    out. Raises `UserError` where after so many `steps` a term has no gradient to give a share of.
    """
    shares = _shares(objective)
    finite = [row for row in norms if all(math.isfinite(norm) for norm in row.values())]
    means = {term: sum(row[term] for row in finite) / max(len(finite), 1) for term in (norms[0] if norms else ())}
    kept = sum(norm for term, norm in means.items() if term not in shares)
    if len(norms) >= steps and (missing := [term for term in shares if not means[term] or not kept]):
        raise UserError(
            f"share of {missing[0]}: no weight gives it, since over the first {len(norms)} steps its gradient, or that "
            "of the terms with a weight, is 0 or not finite; give a weight instead"
        )
    rest = 1 - sum(shares.values())
    found = {term: share / rest * kept / means[term] for term, share in shares.items() if means.get(term) and kept}
    return objective.model_copy(
        update={term: getattr(objective, term).model_copy(update={"weight": w}) for term, w in found.items()}
    )


def _shares(objective: Objective) -> dict[str, float]:
    given = {term: getattr(getattr(objective, term), "share", None) for term in TERMS}
    return {term: share for term, share in given.items() if share is not None}
