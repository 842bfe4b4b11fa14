"""Statistics against brute force, published worked examples, and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from stillroom.analysis.statistics import (
    bootstrap_interval,
    compare,
    detectable_by_signs,
    detectable_effect,
    effect_size,
    equivalence_p,
    equivalence_spread,
    fewest_seeds,
    holm_adjusted,
    interaction_p,
    mean_interval,
    seeds_needed,
    sign_flip_p,
)

# Darwin's Zea mays heights, crossed minus self-fertilised, eighths of an inch: Fisher, The Design of Experiments, 1935
DARWIN = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48], dtype=float)


def test_sign_flips_reproduce_fishers_count():
    """Fisher's own randomisation test: 863 sums of 32,768 in each tail, p = 1726/32768 = 5.267 %."""
    assert sign_flip_p(DARWIN) == pytest.approx(1726 / 32768, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_sign_flips_equal_brute_force(n):
    """Every assignment of signs, counted in plain Python; ties included."""
    rng = np.random.default_rng(n)
    for values in (rng.normal(0.3, 1, n), rng.integers(-2, 3, n).astype(float)):
        observed = abs(values.sum())
        sums = [
            abs(sum(s * v for s, v in zip(signs, values, strict=True)))
            for signs in itertools.product((1, -1), repeat=n)
        ]
        assert sign_flip_p(values) == pytest.approx(np.mean([s >= observed - 1e-12 for s in sums]))


def test_seven_seeds_can_reach_two_in_two_to_the_seventh():
    """The smallest p of seven seeds is 0.0156, and no smaller."""
    assert sign_flip_p(np.arange(1.0, 8.0)) == 2 / 2**7 == pytest.approx(0.0156, abs=1e-4)


def test_interval_and_effect_reproduce_darwins():
    """Student's t on Darwin's data: t(14) = 2.148, p = 0.0497 (Fisher 1935, sec. 17)."""
    low, high = mean_interval(DARWIN)
    assert effect_size(DARWIN) * math.sqrt(15) == pytest.approx(2.148, abs=1e-3)
    assert (low, high) == pytest.approx(stats.ttest_1samp(DARWIN, 0).confidence_interval(), rel=1e-9)
    assert low > 0


def test_detectable_effect_is_that_of_the_published_tables():
    """d_z at 80 % power: 1.27 for 7 pairs, 0.5 for 34 (Cohen's tables; G*Power)."""
    assert detectable_effect(7) == pytest.approx(1.27, abs=0.01)
    assert detectable_effect(34) == pytest.approx(0.494, abs=0.01)
    assert seeds_needed(0.5) == 34
    assert seeds_needed(50.0) == 6  # with five seeds no sign-flip test reaches 0.05
    assert seeds_needed(50.0, contrasts=3) == 7  # nor six, Holm-adjusted over three
    assert seeds_needed(math.nan) is None


def one_by_one(effect, alpha=0.05, power=0.8, contrasts=1):
    """Seeds needed by trying each number; where the power function gives up it is 1, since it was near 1 before."""
    for seeds in itertools.count(math.ceil(math.log2(2 * contrasts / alpha))):
        reached = TTestPower().power(abs(effect), seeds, alpha / contrasts)
        if seeds <= 10:
            reached = power if abs(effect) >= detectable_by_signs(seeds, alpha, contrasts, power) else 0.0
        if seeds >= 10_000 or math.isnan(reached) or reached >= power:
            return seeds
    raise AssertionError


@pytest.mark.parametrize(("alpha", "power", "contrasts"), [(0.05, 0.8, 1), (0.05, 0.8, 3), (0.01, 0.9, 2)])
def test_seeds_needed_are_those_of_trying_every_number(alpha, power, contrasts):
    """However few are asked: the first number with enough power, on either side of zero."""
    for effect in np.concatenate([np.linspace(0.2, 1.5, 18), np.linspace(2, 60, 9)]):
        expected = one_by_one(effect, alpha, power, contrasts)
        assert seeds_needed(effect, alpha, power, contrasts) == expected, effect
        assert seeds_needed(-effect, alpha, power, contrasts) == expected, effect


def test_seeds_needed_are_found_in_few_looks(monkeypatch):
    """A small effect costs tens of looks at the power function, not thousands; so does one that nothing detects."""
    looks = []
    real = TTestPower.power
    monkeypatch.setattr(TTestPower, "power", lambda self, *a, **k: looks.append(a) or real(self, *a, **k))
    for effect, expected in ((0.03, 8723), (0.05, 3142), (0.0001, 10_000), (10.0, 6)):
        looks.clear()
        assert seeds_needed(effect) == expected
        assert len(looks) < 30


def test_holm_is_over_the_declared_family():
    """Smallest times three, next times two, never decreasing."""
    rng = np.random.default_rng(0)
    scores = {"b": np.zeros(7), "x": np.arange(1.0, 8), "y": rng.normal(0, 1, 7), "z": rng.normal(0.8, 1, 7)}
    rows = compare([("x", "b"), ("y", "b"), ("z", "b")], scores, "accuracy")
    raw = sorted(row.p for row in rows)
    expected = np.maximum.accumulate([min(1, p * k) for p, k in zip(raw, (3, 2, 1), strict=True)])
    assert sorted(row.adjusted_p for row in rows) == pytest.approx(list(expected))
    assert rows[0].difference == 4
    assert rows[0].smallest_p == 2 / 128


def test_holm_is_that_of_statsmodels():
    """To the bit, ties and ones among them."""
    rng = np.random.default_rng(5)
    for ps in (rng.random(1), rng.random(6), rng.integers(1, 9, 15) / 128, np.ones(3)):
        assert holm_adjusted(ps.tolist()) == list(multipletests(ps, method="holm")[1])


def test_tost_is_two_one_sided_tests():
    """Against the two t-tests written out; and it needs spread and seeds."""
    values = np.array([0.01, -0.004, 0.006, 0.002, -0.001, 0.008, 0.0])
    n, mean, se = 7, values.mean(), values.std(ddof=1) / math.sqrt(7)
    lower = stats.t.sf((mean + 0.02) / se, n - 1)
    upper = stats.t.cdf((mean - 0.02) / se, n - 1)
    assert equivalence_p(values, 0.02) == pytest.approx(max(lower, upper))
    assert equivalence_p(values + 0.05, 0.02) > 0.5
    assert math.isnan(equivalence_p(np.zeros(5), 0.02))  # all at the floor: nothing was seen to be equal
    assert math.isnan(equivalence_p(np.zeros(1), 0.02))
    for examples in range(20, 400):  # one example more at each of three seeds: the rounding is no spread
        right = np.array([0.3, 0.5, 0.6]) * examples // 1
        alike = (right + 1) / examples - right / examples
        assert math.isnan(equivalence_p(alike, 0.1))
        assert math.isnan(effect_size(alike))


def test_two_tasks_interaction_is_the_paired_sign_flip_test():
    """With two tasks the interaction is the sign-flip test of one task's differences less the other's."""
    rng = np.random.default_rng(1)
    differences = rng.normal([0.0, 0.5], 1, (8, 2))
    assert interaction_p(differences) == pytest.approx(sign_flip_p(differences[:, 0] - differences[:, 1]))
    assert math.isnan(interaction_p(np.tile(rng.normal(size=(5, 1)), 3)))


def test_an_interaction_is_not_found_where_tasks_only_differ_in_size():
    """20 examples of one task and 400 of two: analysis of variance finds a difference in 9 % of studies without one."""
    rng, sizes, found = np.random.default_rng(2), np.array([20, 400, 400]), []
    for _ in range(1000):
        first, second = (rng.binomial(sizes, [0.5, 0.9, 0.9], (7, 3)) / sizes for _ in "ab")
        found.append(interaction_p(first - second))
    assert binomtest(sum(p <= 0.05 for p in found), len(found), 0.05, "greater").pvalue > 0.01
    assert interaction_p(rng.normal([0.0, 0.0, 3.0], 1, (7, 3))) <= 0.05


@pytest.mark.parametrize(("seeds", "contrasts"), [(6, 1), (7, 1), (7, 3), (9, 3)])
def test_the_planned_effect_is_found_by_the_exact_test_as_often_as_planned(seeds, contrasts):
    """With other draws than it was computed from; one seed fewer than it takes is no effect at all."""
    effect = detectable_by_signs(seeds, 0.05, contrasts)
    draws = np.random.default_rng(6).normal(effect, 1, (3000, seeds))
    found = np.mean([sign_flip_p(row) <= 0.05 / contrasts for row in draws])
    assert found == pytest.approx(0.8, abs=0.03)
    assert effect > detectable_effect(seeds, 0.05 / contrasts) - 0.05
    assert math.isnan(detectable_by_signs(fewest_seeds(0.05, contrasts) - 1, 0.05, contrasts))


def test_equal_groups_are_found_equivalent_up_to_the_planned_spread():
    """Four times in five where the differences vary as much as said."""
    spread = equivalence_spread(7, 0.02)
    draws = np.random.default_rng(7).normal(0, spread, (2000, 7))
    assert np.mean([equivalence_p(row, 0.02) <= 0.05 for row in draws]) == pytest.approx(0.8, abs=0.03)
    assert math.isnan(equivalence_spread(1, 0.02))


@pytest.mark.slow
def test_false_positives_stay_under_the_nominal_rate():
    """Under the null, Gaussian or skewed but symmetric in sign, p ≤ 0.05 happens at most that often."""
    rng = np.random.default_rng(2)
    for draw in (lambda: rng.normal(0, 1, 7), lambda: rng.standard_t(2, 7), lambda: rng.choice([-1.0, 0.0, 1.0], 7)):
        rate = np.mean([sign_flip_p(draw()) <= 0.05 for _ in range(4000)])
        assert rate <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 4000)


@pytest.mark.slow
def test_intervals_cover_and_power_is_as_predicted():
    """95 % of t intervals hold the truth; an effect of detectable size is found by t about 80 % of the time."""
    rng = np.random.default_rng(3)
    draws = rng.normal(0.4, 1, (6000, 7))
    covered = np.mean([low <= 0.4 <= high for low, high in map(mean_interval, draws)])
    assert covered == pytest.approx(0.95, abs=0.01)
    found = stats.ttest_1samp(rng.normal(detectable_effect(7), 1, (6000, 7)), 0, axis=1).pvalue <= 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.02)
    equivalent = np.mean([equivalence_p(row, 1.0) <= 0.05 for row in rng.normal(1.0, 1, (4000, 7))])
    assert equivalent <= 0.05 + 0.012


@pytest.mark.slow
def test_the_crossed_bootstrap_holds_for_other_seeds_and_examples():
    """Its interval covers the true difference where both vary, also with few seeds, and is wider than over seeds."""
    rng = np.random.default_rng(4)
    many = rng.normal(0, 1, 20_000)
    truth = np.mean(1 / (1 + np.exp(-(many + 0.3))) - 1 / (1 + np.exp(-many)))
    for seeds in (2, 3, 8):
        covered = []
        for _ in range(120):
            ability = rng.normal(0, 1, 200)
            chance = [1 / (1 + np.exp(-(ability + shift + rng.normal(0, 0.2, (seeds, 1))))) for shift in (0.3, 0.0)]
            first, second = (rng.random((seeds, 200)) < c for c in chance)
            low, high = bootstrap_interval(first, second, rng, draws=300)
            inner = mean_interval(first.mean(axis=1) - second.mean(axis=1))
            assert high - low > 0.85 * (inner[1] - inner[0]), "300 draws err"
            covered.append(low <= truth <= high)
        assert np.mean(covered) >= 0.9, seeds
    assert all(map(math.isnan, bootstrap_interval(first[:1], second[:1], rng))), "one seed says nothing of others"


def test_ties_are_counted_whatever_the_rounding():
    """Tenths are no binary fractions: sums that are equal on paper must not fall on either side of the observed one."""
    rng = np.random.default_rng(5)
    for _ in range(200):
        points = rng.integers(-9, 10, 7)
        assert sign_flip_p(points / 30) == sign_flip_p(points.astype(float))


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_the_bootstrap_draws_seeds_and_examples(alpha):
    """Where one alone varies, the interval is the normal one over it."""
    seeds, examples = 150, 400
    right = np.arange(examples) % 2 == 0
    z = stats.norm.ppf(1 - alpha / 2)
    for first, count in (
        (np.tile(right[:examples], (seeds, 1)), examples),
        (np.tile(right[:seeds, None], (1, examples)), seeds),
    ):
        low, high = bootstrap_interval(first, np.zeros_like(first), np.random.default_rng(0), alpha=alpha)
        half = z * math.sqrt(0.25 / count)
        assert (low + high) / 2 == pytest.approx(0.5, abs=0.2 * half)
        assert (high - low) / 2 == pytest.approx(half, rel=0.1)
