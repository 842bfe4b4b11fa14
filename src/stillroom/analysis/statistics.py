"""Paired comparisons of groups: the unit is the difference between two groups at the same seed.

Plain functions of arrays. S seeds, T tasks, E examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray
from scipy import stats
from scipy.optimize import brentq

_BLOCK = 500
"""Draws of the bootstrap that are in memory at once."""
_EXACT_LIMIT = 20
"""Seeds up to which all 2ⁿ sign flips are counted."""
_MOST_SEEDS = 10_000
"""What `seeds_needed` says at most."""


@dataclass(frozen=True)
class Comparison:
    """One contrast: `first` minus `second`, over seeds. Undefined figures (too few seeds, no spread) are NaN."""

    first: str
    second: str
    measure: str
    seeds: int
    difference: float
    low: float
    high: float
    p: float
    adjusted_p: float
    effect_size: float
    """d_z: mean difference over the standard deviation of the differences."""
    detectable: float
    """Smallest |d_z| that the exact test of this many seeds detects with 80 % power, at Holm's first step over the
    family; NaN where no effect reaches it."""
    smallest_p: float
    """Smallest p that an exact sign-flip test of this many seeds can reach."""


def sign_flip_p(differences: Float[ndarray, "S"]) -> float:
    """Exact two-sided p of a mean difference under random signs (Fisher's randomisation test, paired).

    The share of the 2^S assignments of signs whose |mean| is at least the observed one. More than 20 differences
    are an error: no study of this kind has so many, and the exact count would take too long.
    """
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    if n == 0:
        return math.nan
    sums = np.abs(_signs(n) @ values)
    observed = abs(values.sum())
    return float((sums >= observed - 1e-12 * max(1.0, observed)).mean())


def _signs(count: int) -> ndarray:
    """All 2ⁿ assignments of signs, a row each; the first flips none."""
    if count > _EXACT_LIMIT:
        raise ValueError(f"{count} differences; the exact test is for at most {_EXACT_LIMIT}")
    return 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)


def mean_interval(differences: Float[ndarray, "S"], alpha: float = 0.05) -> tuple[float, float]:
    """Student's t interval of the mean, coverage 1 − α; NaN for fewer than two values."""
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        return math.nan, math.nan
    half = float(stats.t.ppf(1 - alpha / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half


def _have_spread(values: Float[ndarray, "S"]) -> bool:
    """Whether there are two values that differ by more than the rounding of shares that are equal."""
    return len(values) > 1 and float(np.ptp(values)) > 1e-12 * max(1.0, float(np.abs(values).max()))


def effect_size(differences: Float[ndarray, "S"]) -> float:
    """d_z (Lakens 2013): mean over standard deviation of the differences; NaN without spread."""
    values = np.asarray(differences, dtype=np.float64)
    return float(values.mean() / values.std(ddof=1)) if _have_spread(values) else math.nan


@cache
def detectable_effect(seeds: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest |d_z| a paired t-test of so many seeds detects with the given power; NaN for fewer than two."""
    from statsmodels.stats.power import TTestPower  # a second that a plan of few seeds has no need of

    return float(TTestPower().solve_power(nobs=seeds, alpha=alpha, power=power)) if seeds > 1 else math.nan


_SIMULATED = 3000
"""Studies that a figure without a closed form is simulated from: a power then has a standard error of 0.7 %."""
_SIMULATED_SEEDS = 10
"""Seeds up to which they are; beyond, the t-test's power is that of the sign flips too."""


@cache
def detectable_by_signs(seeds: int, alpha: float = 0.05, contrasts: int = 1, power: float = 0.8) -> float:
    """Smallest |d_z| that the exact sign-flip test of so many seeds detects with this power at α / contrasts.

    α / contrasts is Holm's first step, the one that a single real effect among the contrasts has to take. NaN where
    no outcome reaches it. The differences are normal. Where only the smallest p is enough, all differences have to be
    of one sign, Φ(d_z)ⁿ + Φ(−d_z)ⁿ; else by simulation up to 10 seeds, with the same draws always.
    """
    level = alpha / contrasts
    if seeds < 2 or 2 / 2**seeds > level:
        return math.nan
    if 4 / 2**seeds > level:
        return float(brentq(lambda d: stats.norm.cdf(d) ** seeds + stats.norm.cdf(-d) ** seeds - power, 0, 10))
    if seeds > _SIMULATED_SEEDS:
        return detectable_effect(seeds, level, power)
    noise = np.random.default_rng(0).standard_normal((_SIMULATED, seeds))
    signs = _signs(seeds)[: 2 ** (seeds - 1)]  # the other half are their negatives, of the same p
    flipped, shifts = noise @ signs.T, signs.sum(axis=1)
    low, high = 0.0, 10.0
    while high - low > 1e-3:
        effect = (low + high) / 2
        sums = flipped + effect * shifts
        p = (np.abs(sums) >= np.abs(sums[:, :1]) - 1e-12).mean(axis=1)
        low, high = (effect, high) if (p <= level).mean() < power else (low, effect)
    return high


@cache
def equivalence_spread(seeds: int, margin: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """Largest standard deviation of the differences at which TOST finds equal groups equivalent with this power.

    Of normal differences of mean 0, by simulation; NaN for fewer than two seeds.
    """
    if seeds < 2:
        return math.nan
    noise = np.random.default_rng(0).standard_normal((_SIMULATED, seeds))
    half = stats.t.ppf(1 - alpha, seeds - 1) * noise.std(axis=1, ddof=1) / math.sqrt(seeds)
    return margin / float(np.quantile(np.abs(noise.mean(axis=1)) + half, power))


def fewest_seeds(alpha: float, contrasts: int) -> int:
    """Seeds with which exact sign-flip tests, Holm-adjusted over so many contrasts, can reach α: contrasts·2/2ⁿ ≤ α."""
    return math.ceil(math.log2(2 * contrasts / alpha))


def seeds_needed(effect: float, alpha: float = 0.05, power: float = 0.8, contrasts: int = 1) -> int | None:
    """Seeds that the exact sign-flip test needs to detect this d_z at α / contrasts, Holm's first step; 10,000 at most,
    None if undefined."""
    from statsmodels.stats.power import TTestPower

    if not math.isfinite(effect) or effect == 0:
        return None
    power_of = TTestPower().power

    def lacking(seeds: int) -> bool:
        if seeds <= _SIMULATED_SEEDS:
            return bool(detectable_by_signs(seeds, alpha, contrasts, power) > abs(effect))
        # NaN where |effect|·√seeds is large, and so the power 1: no bisection from above, which would meet it
        return bool(power_of(abs(effect), seeds, alpha / contrasts) < power)

    fewest = fewest_seeds(alpha, contrasts)
    short, enough = fewest - 1, fewest
    while enough < _MOST_SEEDS and lacking(enough):
        short, enough = enough, min(2 * enough, _MOST_SEEDS)
    while enough - short > 1:
        middle = (short + enough) // 2
        short, enough = (middle, enough) if lacking(middle) else (short, middle)
    return enough


def holm_adjusted(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Scandinavian Journal of Statistics 6, 1979), in the order given.

    The smallest of m times m, the next times m − 1, …; never falling, at most 1.
    """
    order = np.argsort(ps, kind="stable")
    stepped = np.asarray(ps, dtype=np.float64)[order] * np.arange(len(ps), 0, -1)
    adjusted = np.empty(len(ps))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(stepped))
    return [float(p) for p in adjusted]


def compare(
    pairs: Sequence[tuple[str, str]],
    scores: dict[str, Float[ndarray, "S"]],
    measure: str,
    alpha: float = 0.05,
) -> list[Comparison]:
    """Every contrast of one declared family, Holm-adjusted over that family.

    `scores`: for each group one value a seed, the same seeds in the same order.
    """
    differences = [scores[first] - scores[second] for first, second in pairs]
    raw = [sign_flip_p(by_seed) for by_seed in differences]
    adjusted = holm_adjusted(raw) if all(math.isfinite(p) for p in raw) else raw
    rows = []
    for (first, second), by_seed, p, adjusted_p in zip(pairs, differences, raw, adjusted, strict=True):
        low, high = mean_interval(by_seed, alpha)
        rows.append(
            Comparison(
                first,
                second,
                measure,
                len(by_seed),
                float(by_seed.mean()) if len(by_seed) else math.nan,
                low,
                high,
                p,
                float(adjusted_p),
                effect_size(by_seed),
                detectable_by_signs(len(by_seed), alpha, len(pairs)),
                2 / 2 ** len(by_seed) if len(by_seed) else math.nan,
            )
        )
    return rows


def equivalence_p(differences: Float[ndarray, "S"], margin: float) -> float:
    """TOST (Schuirmann 1987): p of the hypothesis that the mean lies outside ±margin.

    NaN for fewer than two values or without spread: seeds that all sit at a floor are no evidence of equality.
    """
    from statsmodels.stats.weightstats import DescrStatsW

    values = np.asarray(differences, dtype=np.float64)
    if not _have_spread(values):
        return math.nan
    return float(DescrStatsW(values).ttost_mean(-margin, margin)[0])


def interaction_p(differences: Float[ndarray, "S T"]) -> float:
    """Whether the benefit depends on the task: exact sign-flip test of the group × task interaction of two groups.

    A seed's differences, less their mean over tasks, are flipped together; the statistic is the squared length of their
    mean over seeds. Unlike an analysis of variance it needs no equal variances, which tasks of different sizes have
    not. With two tasks it is `sign_flip_p` of one task's differences less the other's. NaN with fewer than two seeds
    or tasks, or without spread.
    """
    seeds, tasks = differences.shape
    if seeds < 2 or tasks < 2 or np.allclose(differences, differences[:, :1]):
        return math.nan
    centred = np.asarray(differences, dtype=np.float64)
    centred = centred - centred.mean(axis=1, keepdims=True)
    lengths = ((_signs(seeds) @ centred) ** 2).sum(axis=1)
    return float((lengths >= lengths[0] * (1 - 1e-9)).mean())


def _counts_drawn(rng: np.random.Generator, draws: int, size: int) -> Float[ndarray, "draws size"]:
    """How often each of so many things is drawn, with replacement, as often as there are things."""
    chosen = rng.integers(size, size=(draws, size)) + size * np.arange(draws)[:, None]
    return np.bincount(chosen.ravel(), minlength=draws * size).reshape(draws, size).astype(np.float64)


def bootstrap_interval(
    first: Shaped[ndarray, "S E"],
    second: Shaped[ndarray, "S E"],
    rng: np.random.Generator,
    draws: int = 10_000,
    alpha: float = 0.05,
) -> tuple[float, float]:
    """Interval of the mean difference, seeds and examples resampled together (crossed bootstrap).

    `first`, `second`: whether each example was answered right, by seed; the same examples in both. Holds for other
    seeds and other examples, where the t interval holds for other seeds alone. The mean ± t(S − 1) times the standard
    deviation of the bootstrap's means times √(S / (S − 1)), which makes up for resampling few seeds; percentiles of so
    few cover far less than they promise. NaN for fewer than two seeds.
    """
    return bootstrap_intervals([first.astype(np.float64) - second.astype(np.float64)], rng, draws, alpha)[0]


def bootstrap_intervals(
    differences: Sequence[Float[ndarray, "S E"]],
    rng: np.random.Generator,
    draws: int = 10_000,
    alpha: float = 0.05,
) -> list[tuple[float, float]]:
    """`bootstrap_interval` of several differences over the same seeds and examples, all from the same draws."""
    seeds, examples = differences[0].shape
    if seeds < 2:
        return [(math.nan, math.nan)] * len(differences)
    stacked = np.stack(differences, axis=-1).transpose(1, 0, 2).reshape(examples, -1)
    means = np.empty((draws, len(differences)))
    for block in np.array_split(means, math.ceil(draws / _BLOCK)):
        seed_counts, example_counts = (_counts_drawn(rng, len(block), size) for size in (seeds, examples))
        by_seed = (example_counts @ stacked).reshape(len(block), seeds, len(differences))
        block[:] = np.einsum("bs,bsc->bc", seed_counts, by_seed) / (seeds * examples)
    halves = stats.t.ppf(1 - alpha / 2, seeds - 1) * math.sqrt(seeds / (seeds - 1)) * means.std(axis=0)
    centres = [float(difference.mean()) for difference in differences]
    return [(centre - float(half), centre + float(half)) for centre, half in zip(centres, halves, strict=True)]
