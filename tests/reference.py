"""The loss by its definition: loops over everything, float64, one example at a time, no code of the package.

Inputs are one example's own arrays: each model's ids, character ends, special flags, and what an eager, unpadded
forward pass gave. Only numpy.
"""

from __future__ import annotations

import numpy as np


def log_softmax(row):
    """Log-probabilities of one row of logits."""
    row = np.asarray(row, dtype=np.float64)
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


def last_ending_at(ends, special):
    """End character to the last token that ends there; specials and empty ends left out."""
    return {int(end): t for t, end in enumerate(ends) if not special[t] and end > 0}


def pairs(teacher, student):
    """(teacher token, student token) for every shared end."""
    t, s = (last_ending_at(m["ends"], m["special"]) for m in (teacher, student))
    return [(t[end], s[end]) for end in sorted(t.keys() & s.keys())]


def task_terms(student, prompt_length):
    """Cross-entropies of the supervised tokens: inside the answer, and the final EOS."""
    terms = []
    for t in range(1, len(student["ids"])):
        inside = not student["special"][t] and student["ends"][t] > prompt_length
        if inside or (student["special"][t] and t == len(student["ids"]) - 1):
            terms.append(-log_softmax(student["logits"][t - 1])[student["ids"][t]])
    return terms


def divergence(p, q, name, mixing):
    """Of two distributions over the same outcomes, by its definition."""

    def kl(a, b):
        return sum(x * (np.log(x) - np.log(y)) for x, y in zip(a, b, strict=True) if x > 0)

    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, np.maximum(p, 1e-10))
    if name == "skewed_forward_kl":
        return kl(p, mixing * p + (1 - mixing) * q)
    if name == "skewed_reverse_kl":
        return kl(q, mixing * q + (1 - mixing) * p)
    if name == "total_variation":
        return sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2
    assert name == "jensen_shannon"
    middle = mixing * p + (1 - mixing) * q
    return mixing * kl(p, middle) + (1 - mixing) * kl(q, middle)


def kd_terms(teacher, student, prompt_length, vocabulary_map, top_k, temperature=1.0, name="forward_kl", mixing=0.5):
    """The divergence over mapped ids and all else, at aligned positions whose next token is in the answer."""
    terms = []
    for j, i in pairs(teacher, student):
        if i + 1 >= len(student["ids"]) or student["special"][i + 1] or student["ends"][i + 1] <= prompt_length:
            continue
        p, q = np.exp(log_softmax(teacher["logits"][j])), np.exp(log_softmax(student["logits"][i]))
        entries = {}
        for token in np.argsort(-p, kind="stable")[:top_k]:
            if vocabulary_map[token] >= 0:
                entries[int(vocabulary_map[token])] = entries.get(int(vocabulary_map[token]), 0.0) + p[token]
        everything = len(entries) == len(q)
        p_all = [*entries.values()] + ([] if everything else [1 - sum(entries.values())])
        q_all = [q[token] for token in entries]
        if not everything:
            q_all.append(sum(q[v] for v in range(len(q)) if v not in entries))
        p_all, q_all = np.array(p_all) ** (1 / temperature), np.array(q_all) ** (1 / temperature)
        if temperature != 1.0:
            p_all, q_all = p_all / p_all.sum(), q_all / q_all.sum()
        terms.append(temperature**2 * divergence(p_all, q_all, name, mixing))
    return terms


def hidden_terms(teacher, student, weight, bias):
    """Squared differences of every dimension at every aligned token."""
    terms = []
    for j, i in pairs(teacher, student):
        projected = np.asarray(weight, np.float64) @ np.asarray(student["hidden"][i], np.float64) + bias
        terms.extend((projected - teacher["hidden"][j]) ** 2)
    return terms


def hidden_distance(teacher, student, name, weight=None, bias=None):
    """(sum, count) of one example's hidden states by another distance than the squared difference."""
    aligned = pairs(teacher, student)
    t = np.array([teacher["hidden"][j] for j, _ in aligned], np.float64)
    s = np.array([student["hidden"][i] for _, i in aligned], np.float64)

    def cos(a, b):
        return (a @ b) / (np.linalg.norm(a) * np.linalg.norm(b))

    if name == "cosine":
        return sum(1 - cos(weight @ b + bias, a) for a, b in zip(t, s, strict=True)), len(aligned)
    if name == "gram":
        cells = [(cos(s[a], s[b]) - cos(t[a], t[b])) ** 2 for a in range(len(t)) for b in range(len(t))]
        return np.mean(cells), 1
    assert name == "cka"
    if len(t) < 2:
        return 0.0, 1
    s, t = s - s.mean(0), t - t.mean(0)
    alignment = np.linalg.norm(s.T @ t) ** 2 / (np.linalg.norm(s.T @ s) * np.linalg.norm(t.T @ t))
    return 1 - alignment, 1


def segment_bounds(model, column, shared, own_bos):
    """(first token, last token) of each segment."""
    bounds, first = [], 0
    if own_bos:
        bounds, first = [(0, 0)], 1
    for pair in shared:
        bounds.append((first, pair[column]))
        first = pair[column] + 1
    return bounds


def attention_map(model, bounds, pair_heads):
    """Rows: query at a segment's last token; columns: attention summed over a segment's tokens."""
    attention = np.asarray(model["attention"], np.float64)
    if not pair_heads:
        attention = attention.mean(0, keepdims=True)
    result = np.zeros((len(attention), len(bounds), len(bounds)))
    for h in range(len(attention)):
        for g, (_, row) in enumerate(bounds):
            for s, (first, last) in enumerate(bounds):
                result[h, g, s] = sum(attention[h, row, t] for t in range(first, last + 1))
    return result


def attention_divergences(teacher, student):
    """KL(teacher's row ‖ student's row) of every head and row over segments."""
    shared = pairs(teacher, student)
    own_bos = bool(teacher["special"][0] and student["special"][0])
    pair_heads = len(teacher["attention"]) == len(student["attention"])
    t, s = (
        attention_map(m, segment_bounds(m, column, shared, own_bos), pair_heads)
        for column, m in enumerate((teacher, student))
    )
    return [
        sum(p * np.log(p / max(q, 1e-10)) for p, q in zip(t[h, g], s[h, g], strict=True) if p > 0)
        for h in range(len(t))
        for g in range(t.shape[1])
    ]


def attention_terms(teacher, student):
    """(squared differences of causal columns, number of rows) over heads."""
    shared = pairs(teacher, student)
    own_bos = bool(teacher["special"][0] and student["special"][0])
    pair_heads = len(teacher["attention"]) == len(student["attention"])
    maps = [
        attention_map(m, segment_bounds(m, column, shared, own_bos), pair_heads)
        for column, m in enumerate((teacher, student))
    ]
    heads, size = maps[0].shape[:2]
    terms = [
        (maps[0][h, g, s] - maps[1][h, g, s]) ** 2 for h in range(heads) for g in range(size) for s in range(g + 1)
    ]
    return terms, heads * size


def value_divergences(teacher, student, heads):
    """KL(teacher's row ‖ student's row) of value relations at aligned tokens, of every relation head and row."""
    aligned = pairs(teacher, student)
    sides = []
    for model, column in ((teacher, 0), (student, 1)):
        values = np.array([model["values"][pair[column]] for pair in aligned], np.float64)
        size = values.shape[1] // heads
        rows = []
        for h in range(heads):
            part = values[:, h * size : (h + 1) * size]
            for a in range(len(part)):
                rows.append(log_softmax([part[a] @ part[b] / np.sqrt(size) for b in range(a + 1)]))
        sides.append(rows)
    return [float((np.exp(t) * (t - s)).sum()) for t, s in zip(*sides, strict=True)]
