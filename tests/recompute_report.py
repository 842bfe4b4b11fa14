"""Every number of a report, computed again from `predictions.parquet` and `result.json` alone.

Shares no code with the package: plain Python, NumPy and SciPy's distributions. `python tests/recompute_report.py
RESULTS` checks a finished study's folder; the tests check a made-up one and the quickstart's.
"""

from __future__ import annotations

import functools
import html
import itertools
import json
import math
import re
import statistics
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import optimize, stats
from statsmodels.stats import power


class Tables(HTMLParser):
    """Tables of a page by their id, each a list of rows of cell texts."""

    def __init__(self, page):
        super().__init__()
        self.tables, self._rows, self._cell = {}, None, None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        """A table, a row, a cell begins."""
        if tag == "table":
            self._rows = self.tables.setdefault(dict(attributes).get("id"), [])
        elif tag == "tr" and self._rows is not None:
            self._rows.append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_data(self, data):
        """Text of a cell."""
        if self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag):
        """A cell ends."""
        if tag in ("td", "th"):
            self._rows[-1].append(" ".join("".join(self._cell).split()))
            self._cell = None


def raw(results):
    """By (group, seed): whether each example was answered right, by task; and the trial's `result.json`."""
    planned = json.loads((results / "planned.json").read_text())
    found = {}
    for trial in planned["trials"]:
        folder = results / "knowledge_distillation_experiment" / trial["name"]
        if (folder / "result.json").is_file():
            rows = pd.read_parquet(folder / "predictions.parquet").sort_values("example_id")
            result = json.loads((folder / "result.json").read_text())
            found[trial["group"], trial["seed"]] = (rows, result)
    return planned["study"], found


def keyed(epoch):
    """An epoch's numbers by split, task and measure."""
    return {(row["split"], row["task"], row["measure"]): row["value"] for row in epoch["metrics"]}


def value_of(epoch, split, measure):
    """One number of all tasks together."""
    return keyed(epoch)[split, None, measure]


def together(tasks):
    """What a report calls all tasks together."""
    return "all tasks" if "all" in set(tasks) else "all"


_JUDGED = {}
"""What was judged of a table, by its id; the table is kept beside it, so that no other one gets its id."""


def right(rows, measure):
    """Whether each answer is right, judged again from prediction and gold; once for each table."""
    _, known = _JUDGED.setdefault(id(rows), (rows, {}))
    if not known:
        judged = np.array([p == g for p, g in zip(rows["prediction"], rows["gold"], strict=True)], dtype=float)
        tasks = rows["task"].to_numpy()
        known |= {together(tasks): judged, **{task: judged[tasks == task] for task in set(tasks)}}
    return known[measure]


def accuracy(rows, measure):
    """Share of right answers."""
    return float(right(rows, measure).mean())


def sign_flip(values):
    """Exact two-sided p by brute force."""
    observed = abs(sum(values))
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    return sum(s >= observed - 1e-12 for s in sums) / len(sums)


def holm(ps):
    """Holm's step-down adjustment."""
    adjusted, running = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        running = max(running, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = running
    return adjusted


@functools.cache
def detectable(n, level):
    """Smallest d_z that the exact test finds with 80 % power, by another simulation; NaN if none."""
    if 2 / 2**n > level:
        return math.nan
    if n > 10:  # the t-test's
        return power.TTestPower().solve_power(nobs=n, alpha=level, power=0.8)
    noise = np.random.default_rng(99).normal(size=(3000, n))
    signs = np.array(list(itertools.product((1, -1), repeat=n)))

    def lacking(effect):
        sums = np.abs((noise + effect) @ signs.T)
        return ((sums >= sums[:, :1] - 1e-12).mean(1) <= level).mean() - 0.8

    return optimize.bisect(lacking, 0.01, 20, xtol=1e-3)


def tost(values, margin):
    """p of two one-sided t-tests."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    below = stats.t.sf((statistics.mean(values) + margin) / error, len(values) - 1)
    above = stats.t.cdf((statistics.mean(values) - margin) / error, len(values) - 1)
    return max(below, above)


def interaction(values):
    """Exact p by brute force: seeds flipped whole, each less its mean over tasks; `values` (seeds, tasks)."""
    rows = [[v - sum(row) / len(row) for v in row] for row in values.tolist()]

    def spread(signs):
        return sum(sum(s * v for s, v in zip(signs, column, strict=True)) ** 2 for column in zip(*rows, strict=True))

    lengths = [spread(signs) for signs in itertools.product((1, -1), repeat=len(rows))]
    return sum(length >= lengths[0] - 1e-12 for length in lengths) / len(lengths)


def number(text):
    """The first number in a cell; NaN for a dash."""
    found = re.search(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?", text.replace("−", "-"))
    return float(found.group()) if found else math.nan


def same(shown, expected, digits):
    """Whether a shown figure is the expected one, rounded."""
    if math.isnan(expected):
        return math.isnan(number(shown))
    return abs(number(shown) - expected) <= 0.5 * 10**-digits * 1.001 + 1e-9


def probable(shown, expected):
    """Whether a shown p is the expected one: three decimals, or under the least of them."""
    if shown == "<0.001":
        return expected < 0.0005
    return same(shown, expected, 3) and (math.isnan(expected) or expected >= 0.0005)


def check_report(results, bootstrap=True):
    """Compare every table of `report.html` with what the raw rows give; returns how many figures agreed.

    Without `bootstrap` its intervals are not looked at. Raises AssertionError naming the first that does not.
    """
    page = re.sub(r'"data:[^"]*"', '""', (results / "report.html").read_text("utf-8"))
    tables = Tables(page).tables
    study, trials = raw(results)
    seeds = study["sweep"]["seeds"]
    tasks = list(study["corpus"]["tasks"])
    checked = check_accuracy(tables["accuracy-table"], results, trials, tasks)
    if "test-table" in tables:
        test = {
            (result["config"]["distill_type"], result["config"]["seed"]): (
                pd.read_parquet(
                    results / "knowledge_distillation_experiment" / result["trial"] / "predictions_test.parquet"
                ),
                result,
            )
            for _, result in trials.values()
        }
        scored = [task for task in tasks if task in study["evaluation"]["test_splits"]]
        checked += check_accuracy(tables["test-table"], results, test, scored, "_test")
    checked += check_summary(tables["answer-table"], results, trials, study)
    checked += check_trials(tables["trials-table"], trials, tasks)
    checked += check_cost(tables["cost-table"], trials)
    checked += check_others(tables["others-table"], results, trials, tasks)
    checked += check_shares(tables["gradients-table"], trials)
    checked += check_coverage(tables.get("coverage-table", [[]]), trials)
    checked += check_kinds(tables.get("kinds-table", [[]]), trials)
    contrasts = []
    for name, rows in tables.items():
        if name and name.startswith("contrasts-"):
            constants = html.unescape(re.search(rf'id="{name}-constants">Every row: (.*?)\.</p>', page).group(1))
            said = dict(part.rsplit(" ", 1) for part in constants.split("; "))
            rows = [said | dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
            contrasts += [(name, row) for row in rows]
    checked += check_contrasts([row for _, row in contrasts], results, trials, study, bootstrap)
    check_questions(page, contrasts, study)
    names = {group["name"] for group in study["groups"]}
    primary = [tuple(pair) for pair in study["analysis"]["primary"] if set(pair) <= names]
    checked += check_interactions(page, trials, seeds, tasks, primary)
    return checked


def check_accuracy(rows, results, trials, tasks, suffix=""):
    """Means and standard deviations over seeds; the baselines."""
    done = 0
    groups = {group for group, _ in trials}
    for name, count, *cells in rows[1:]:
        for measure, cell in zip([together(tasks), *tasks], cells, strict=True):
            if name in groups:
                values = [
                    accuracy(predictions, measure) for (group, _), (predictions, _) in trials.items() if group == name
                ]
                assert int(count) == len(values)
                assert same(cell, 100 * statistics.mean(values), 1), (name, measure, cell)
                if len(values) > 1:
                    assert same(cell.split("±")[1], 100 * statistics.stdev(values), 1), (name, measure, cell)
            elif count == "baseline":
                file = results / "baselines" / f"{name.split()[0]}{suffix}.parquet"
                assert same(cell, 100 * accuracy(pd.read_parquet(file), measure), 1), (name, measure, cell)
            done += cell != "–"
    return done


def check_summary(rows, results, trials, study):
    """The first table: means, differences to each group's baseline, the share of the gap that is closed."""
    tasks = list(study["corpus"]["tasks"])
    whole = together(tasks)
    ends = [pd.read_parquet(results / "baselines" / f"{role}.parquet") for role in ("teacher", "student")]
    teacher, student = (accuracy(predictions, whole) for predictions in ends)
    boxes, groups = asked_of_every_study(study)
    declared = [pair for kind in ("primary", "secondary") for pair in study["analysis"][kind]]
    pairs = [*study["analysis"]["primary"], *boxes, *declared, *([group, BEFORE] for group in groups)]
    pairs = [pair for pair in pairs if set(pair) <= {*groups, BEFORE}]
    done = 0
    for name, mean, difference, count, closed in rows[1:]:
        if name not in groups:
            expected = teacher if name.startswith("teacher") else student
        else:
            by_seed = {
                seed: accuracy(predictions, whole)
                for (group, seed), (predictions, _) in trials.items()
                if group == name
            }
            assert int(count.split()[0]) == len(by_seed)
            expected = statistics.mean(by_seed.values()) if by_seed else math.nan
            second = next(pair[1] for pair in pairs if pair[0] == name)
            family = next(family for family in families_of(study) if [name, second] in [list(p) for p in family])
            involved = {group for pair in family for group in pair if group != BEFORE}
            used = [s for s in by_seed if all((group, s) in trials for group in involved)]
            assert f"to {second}: " in difference
            other = {s: student if second == BEFORE else accuracy(trials[second, s][0], whole) for s in by_seed
                     if second == BEFORE or (second, s) in trials}  # fmt: skip
            if number(difference) == number(difference):
                assert count == (str(len(by_seed)) if used == [*by_seed] else f"{len(by_seed)} ({len(used)} compared)")
                gain = 100 * statistics.mean(by_seed[s] - other[s] for s in used)
                assert same(difference, gain, 1), (name, difference)
        assert same(mean, 100 * expected, 1), (name, mean)
        share = 100 * (expected - student) / (teacher - student) if teacher > student else math.nan
        assert same(closed, share, 1), (name, closed)
        done += 3
    return done


def check_trials(rows, trials, tasks):
    """A row a trial, each accuracy judged again."""
    shown = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    assert [(row["group"], int(row["seed"])) for row in shown] == list(trials)
    for row in shown:
        predictions, result = trials[row["group"], int(row["seed"])]
        for measure in (together(tasks), *tasks):
            assert same(row[measure], 100 * accuracy(predictions, measure), 1), row
        assert same(row["task loss"], value_of(result["epochs"][-1], "validation", "task_loss"), 3), row
    return len(shown) * (len(tasks) + 2)


def check_cost(rows, trials):
    """The median over seeds of a step's time in the fastest epoch, and its range."""
    for row in rows[1:]:
        found = []
        for (group, _), (_, result) in trials.items():
            if group == row[0]:
                steps = [0, *(epoch["step"] for epoch in result["epochs"])]
                paces = zip(result["epochs"], steps[1:], steps, strict=False)
                found.append(
                    min(1000 * epoch["train_seconds"] / (end - start) for epoch, end, start in paces if end > start)
                )
        least, most = row[2].split(" … ")
        assert same(row[1], statistics.median(found), 1), row
        assert same(least, min(found), 1), row
        assert same(most, max(found), 1), row
    return 3 * len(rows[1:])


def calibration_error(rows):
    """Expected calibration error over ten bins, example by example."""
    bins = [[] for _ in range(10)]
    for scores, p, g in zip(rows["scores"], rows["prediction"], rows["gold"], strict=True):
        probabilities = np.exp(scores) / np.exp(scores).sum()
        sure = probabilities.max()
        bins[min(9, max(0, math.ceil(sure * 10) - 1))].append((sure, p == g))
    gaps = [abs(sum(right for _, right in inside) - sum(sure for sure, _ in inside)) for inside in bins if inside]
    return sum(gaps) / len(rows)


def check_others(rows, results, trials, tasks):
    """Task loss, mean of tasks, flexible accuracy, calibration, agreement: means over seeds."""
    teacher = pd.read_parquet(results / "baselines" / "teacher.parquet").set_index("example_id")["prediction"]

    def measure(heading, rows, result):
        task, _, what = heading.partition(", ")
        task_rows = rows[rows["task"] == task]
        if heading == "task loss, nats per token":
            return value_of(result["epochs"][-1], "validation", "task_loss")
        if heading == "mean of tasks":
            return statistics.mean(accuracy(rows, name) for name in tasks)
        if what == "flexible extract":
            return task_rows["correct_flexible"].mean()
        if what == "calibration error":
            return calibration_error(task_rows)
        assert what == "agreement with teacher", heading
        return float(np.mean(task_rows["prediction"].to_numpy() == teacher[task_rows["example_id"]].to_numpy()))

    done, groups = 0, {group for group, _ in trials}
    for name, *cells in rows[1:]:
        if name in groups:
            for heading, cell in zip(rows[0][1:], cells, strict=True):
                values = [measure(heading, *trials[key]) for key in trials if key[0] == name]
                scale, digits = (1, 3) if heading.startswith("task loss") else (100, 1)
                assert same(cell, scale * statistics.mean(values), digits), (name, heading, cell, values)
                done += 1
    return done


def check_shares(rows, trials):
    """Each term's share of the gradient: mean over measurements, then over seeds."""
    done = 0
    for group, *cells in rows[1:]:
        for term, cell in zip(rows[0][1:], cells, strict=True):
            means = []
            for (trained_group, _), (_, result) in trials.items():
                norms = [row["norms"] for row in result["gradients"]]
                if trained_group == group and norms and term in norms[0]:
                    means.append(statistics.mean(n[term] / sum(n.values()) for n in norms))
            assert bool(cell) == bool(means), (group, term, cell)
            if means:
                assert same(cell, 100 * statistics.mean(means), 1), (group, term, cell)
                done += 1
    return done


def check_coverage(rows, trials):
    """Shares of aligned tokens and predictions, from their counts."""
    coverage = next((result["coverage"] for _, result in trials.values() if result["coverage"]), {})
    for task, tokens, aligned, predictions, aligned_predictions, position in rows[1:]:
        counts = coverage[task]
        assert int(tokens) == counts["tokens"]
        assert int(predictions) == counts["predictions"]
        assert same(aligned, 100 * counts["aligned"] / counts["tokens"], 1)
        assert same(aligned_predictions, 100 * counts["aligned_predictions"] / counts["predictions"], 1)
        assert same(position, 100 * counts["same_position"] / counts["aligned"], 1)
    return 5 * len(rows[1:])


def check_kinds(rows, trials):
    """Shares of aligned tokens and predictions by kind of text, and each group's mean loss there."""
    done = 0
    for row in rows[1:]:
        shown = dict(zip(rows[0], row, strict=True))
        kind = shown["kind of text"]
        known = [(group, result["kinds"][kind]) for (group, _), (_, result) in trials.items() if result.get("kinds")]
        counts = known[0][1]
        assert int(shown["student tokens"]) == counts["tokens"]
        assert same(shown["tokens aligned"], 100 * counts["aligned"] / counts["tokens"], 1), shown
        if counts["predictions"]:
            share = counts["aligned_predictions"] / counts["predictions"]
            assert same(shown["predictions aligned"], 100 * share, 1), shown
        for heading in [name for name in shown if name.startswith("KD loss, ")]:
            group = heading.removeprefix("KD loss, ")
            losses = [counts["kd_loss"] for name, counts in known if name == group and "kd_loss" in counts]
            assert same(shown[heading], statistics.mean(losses) if losses else math.nan, 3), (shown, heading)
        done += len(shown) - 1
    return done


BEFORE = "student before training"
"""What tables call it."""


def asked_of_every_study(study):
    """Pairs that no study declares: black box against labels alone, each group against the student before training."""
    terms = {group["name"]: set(group["terms"]) for group in study["groups"]}
    declared = [pair for kind in ("primary", "secondary") for pair in study["analysis"][kind]]
    present = {name for pair in declared if set(pair) <= set(terms) for name in pair}
    boxes = [name for name, group_terms in terms.items() if group_terms == {"task", "kd"}]
    distilled = [name for name, group_terms in terms.items() if group_terms != {"task"}]
    boxes = [name for name in boxes if name in present] or boxes[:1] or distilled
    pairs = [[box, name] for box in boxes for name, group_terms in terms.items() if group_terms == {"task"}]
    return [pair for pair in pairs if pair not in declared and pair[::-1] not in declared], list(terms)


def families_of(study):
    """Lists of pairs over which p is adjusted."""
    names = {group["name"] for group in study["groups"]}
    declared = [[p for p in study["analysis"][kind] if set(p) <= names] for kind in ("primary", "secondary")]
    boxes, groups = asked_of_every_study(study)
    return [family for family in (*declared, boxes, *([[group, BEFORE]] for group in groups)) if family]


def check_questions(page, contrasts, study):
    """Each contrast stands under the question that its groups' terms ask, and no family is left out."""
    terms = {group["name"]: set(group["terms"]) - {"task"} for group in study["groups"]} | {BEFORE: set()}
    odd = {group["name"] for group in study["groups"] if group.get("placebo")}  # they have a question of their own
    headings = dict(re.findall(r'<h3>([^<]*)</h3>.*?<table id="(contrasts-\d+)"', page, re.DOTALL))
    questions = {table: question for question, table in headings.items()}
    inner = {"hidden", "attention", "values"}
    for table, row in contrasts:
        first, second = (terms[name] for name in row["contrast"].split(" − "))
        one, other = first & inner, second & inner
        if odd.intersection(row["contrast"].split(" − ")) and first and second:
            expected = "only more gradient"
        elif not (first and second):
            expected = "Does distilling help"
        elif bool(one) != bool(other):
            expected = "white-box signals improve over black-box"
        elif one < other or other < one:
            expected = "combining"
        elif one != other:
            expected = "which is worth more"
        else:
            expected = "Does it matter how|beside the other signals|only more gradient"
        assert re.search(expected, questions[table]), (row["contrast"], questions[table])
    shown = {tuple(row["contrast"].split(" − ")) for _, row in contrasts}
    assert shown >= {tuple(pair) for family in families_of(study) for pair in family if BEFORE not in pair}


def check_contrasts(rows, results, trials, study, with_bootstrap=True):
    """Differences, intervals, exact p, Holm, d_z, detectable effect, smallest p, TOST, verdict."""
    done, families = 0, families_of(study)
    seeds, alpha = study["sweep"]["seeds"], study["analysis"]["alpha"]
    student = pd.read_parquet(results / "baselines" / "student.parquet").sort_values("example_id")
    trials = trials | {(BEFORE, seed): (student, None) for seed in seeds}
    for row in rows:
        pair, measure, verdict = row["contrast"].split(" − "), row["on"], row["verdict"]
        family = next(f for f in families if pair in f)
        involved = {group for pair in family for group in pair}
        assert int(row["contrasts in the family"]) == len(family), row
        whole = all((group, seed) in trials for group in involved for seed in seeds)
        if not whole and study["analysis"]["incomplete"] == "refuse":
            assert (int(row["seeds"]), verdict) == (0, "undecided")
            continue
        used = [seed for seed in seeds if all((group, seed) in trials for group in involved)]
        score = {group: [accuracy(trials[group, seed][0], measure) for seed in used] for group in involved}
        by_pair = [[a - b for a, b in zip(score[x], score[y], strict=True)] for x, y in family]
        values = by_pair[family.index(pair)]
        n, mean = len(values), statistics.mean(values)
        assert int(row["seeds"]) == n
        assert same(row["difference"], 100 * mean, 1), row
        exact = [sign_flip(differences) for differences in by_pair]
        own_p, own_adjusted = exact[family.index(pair)], holm(exact)[family.index(pair)]
        assert probable(row["p"], own_p), (row, own_p)
        assert probable(row.get("adjusted p", row["p"]), own_adjusted), (row, own_adjusted)
        assert probable(row["smallest p"], 2 / 2**n)
        done += 4
        if n < 2:
            continue
        spread = statistics.stdev(values)
        half = stats.t.ppf(1 - alpha / 2, n - 1) * spread / math.sqrt(n)
        low, high = row["interval"].split(" … ")
        assert same(low, 100 * (mean - half), 1), row
        assert same(high, 100 * (mean + half), 1), row
        effect, least = detectable(n, alpha / len(family)), row["detectable d_z"]
        near = math.isclose(number(least), effect, rel_tol=0.05)  # both are simulated
        assert math.isnan(number(least)) if math.isnan(effect) else near, (row, effect)
        margin = study["analysis"]["equivalence_margin"]
        spread = spread if spread > 1e-12 else 0.0  # the rounding of equal shares
        alike = tost(values, margin) if spread else math.nan
        assert same(row["d_z"], mean / spread if spread else math.nan, 2), row
        assert probable(row["TOST p"], alike), (row, alike)
        told = expected_verdict(mean, own_adjusted, alike, len(family) * 2 / 2**n, alpha)
        assert verdict == ("undecided" if never_apart(pair, trials) else told), row
        if with_bootstrap:
            check_bootstrap(row["with examples"], pair, measure, trials, used, alpha)
        done += 7
    return done


def never_apart(pair, trials):
    """Whether trials of two groups with other terms have the same losses, accuracies and weights at some seed."""

    def measured(result, names):
        return [[keyed(epoch).get(name, epoch.get(name)) for name in names] for epoch in result["epochs"]]

    for seed in {seed for _, seed in trials}:
        if BEFORE not in pair and all((group, seed) in trials for group in pair):
            first, second = (trials[group, seed][1] for group in pair)
            names = [key for key in keyed(first["epochs"][0]) if key[2] != "loss"]
            shared = [*(key for key in names if key in keyed(second["epochs"][0])), "weights"]
            if first["config"]["objective"] != second["config"]["objective"] and measured(first, shared) == measured(
                second, shared
            ):
                return True
    return False


def expected_verdict(mean, adjusted, alike, smallest, alpha):
    """The declared rule, said again; `smallest`: the adjusted p that no result could be under."""
    if adjusted <= alpha:
        return "improves" if mean > 0 else "worse"
    if alike <= alpha:
        return "equivalent"
    return "undecided" if smallest > alpha else "no evidence of a difference"


@functools.cache
def counts_of_draws(draws, size, stream):
    """How often each of so many things is drawn, with replacement, as often as there are things."""
    chosen = np.random.default_rng([12345, stream]).integers(0, size, (draws, size))
    return np.array([np.bincount(row, minlength=size) for row in chosen], dtype=float)


def check_bootstrap(shown, pair, measure, trials, seeds, alpha):
    """Seeds and examples resampled together with another generator: ends agree within the error of simulation."""
    first, second = (np.array([right(trials[group, seed][0], measure) for seed in seeds]) for group in pair)
    difference, draws = first - second, 4000
    seed_counts, example_counts = (counts_of_draws(draws, size, n) for n, size in enumerate(difference.shape))
    means = ((seed_counts @ difference) * example_counts).sum(1) / difference.size
    n = len(seeds)
    half = stats.t.ppf(1 - alpha / 2, n - 1) * math.sqrt(n / (n - 1)) * statistics.pstdev(means)
    near = 4 * half * math.sqrt((1 / 10_000 + 1 / draws) / 2) + 0.0006  # four standard errors of two simulations
    for text, end in zip(shown.split(" … "), (difference.mean() - half, difference.mean() + half), strict=True):
        assert abs(number(text) / 100 - end) <= near, (pair, measure, shown, end)


def check_interactions(page, trials, seeds, tasks, family):
    """Every interaction p in the answer about task dependence, adjusted over the primary contrasts."""
    found = re.findall(r"(\w+) against (\w+): [\w ]+ \(interaction, adjusted p (?:= )?(&lt; )?([\d.]+)\)", page)
    used = [seed for seed in seeds if all((group, seed) in trials for pair in family for group in pair)]

    def probability(first, second):
        values = [[accuracy(trials[first, s][0], t) - accuracy(trials[second, s][0], t) for t in tasks] for s in used]
        alike = all(math.isclose(value, row[0], abs_tol=1e-9) for row in values for value in row)
        return 1.0 if alike else interaction(np.array(values))

    adjusted = dict(zip(family, holm([probability(*pair) for pair in family]), strict=True)) if found else {}
    for first, second, below, shown in found:
        assert probable("<0.001" if below else shown, adjusted[first, second]), (first, second, shown)
    return len(found)


if __name__ == "__main__":
    print(f"{check_report(Path(sys.argv[1]))} figures of {sys.argv[1]}/report.html recomputed and found the same")
