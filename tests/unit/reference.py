"""PPO's mathematics a second time, for the tests to compare with: float64, one row and one token at a time.

Written from the papers. It imports neither torch nor the package and knows no padding: a batch is a list of rows, each
row a list of numbers as long as its response. Where the package states a number of its own (the cut at 20 nats, the
epsilons) it is stated here again, not imported.
"""

import math

import numpy as np

Row = list[float]


def kl(logprobs: Row, ref_logprobs: Row, estimator: str) -> Row:
    """Schulman 2020, with r = q / p: k1 = - log r, k2 = (log r)^2 / 2, k3 = (r - 1) - log r; log r cut at 20 in r."""
    result = []
    for p, q in zip(logprobs, ref_logprobs):
        log_r = np.float64(q) - np.float64(p)
        if estimator == "k1":
            result.append(-log_r)
        elif estimator == "k2":
            result.append(log_r**2 / 2)
        else:
            result.append((np.exp(min(log_r, 20.0)) - 1) - log_r)
    return result


def paid_score(
    score: float,
    *,
    finished: bool,
    length: int,
    history: Row,
    running: str,
    clip: float | None,
    missing_eos: str,
    missing_eos_penalty: float,
    length_penalty: float,
) -> float:
    """Zheng et al. 2023, section 5.3: (r - mean) / std of all scores so far, clip; Huang et al. 2024: missing EOS."""
    if running != "none":
        mean = sum(history) / len(history)
        variance = sum((x - mean) ** 2 for x in history) / len(history)
        if running == "shift_scale":
            score = score - mean
        score = score / np.sqrt(variance + 1e-8)
    if clip is not None:
        score = min(max(score, -clip), clip)
    if not finished:
        score = -missing_eos_penalty if missing_eos == "replace" else score - missing_eos_penalty
    return score - length_penalty * length


def rewards(score: float, penalty: Row, *, coef: float, position: str, width: int) -> Row:
    """Ziegler et al. 2019, eq. 2. One number more than tokens for eos_plus_one, if the response is below `width`."""
    row = [-coef * x for x in penalty]
    if position == "eos_plus_one" and len(row) < width:
        row.append(0.0)
    row[-1] += score
    return row


def whiten(rows: list[Row], *, shift_mean: bool = True) -> list[Row]:
    """Ziegler et al. 2019 code: biased variance over all tokens, 1e-8 inside the root."""
    numbers = [np.float64(x) for row in rows for x in row]
    mean = sum(numbers) / len(numbers)
    variance = sum((x - mean) ** 2 for x in numbers) / len(numbers)
    kept = 0.0 if shift_mean else mean
    return [[(x - mean) / np.sqrt(variance + 1e-8) + kept for x in row] for row in rows]


def clip_all(rows: list[Row], limit: float) -> list[Row]:
    return [[min(max(x, -limit), limit) for x in row] for row in rows]


def gae(rewards: Row, values: Row, *, gamma: float, lam: float) -> tuple[Row, Row]:
    """Schulman et al. 2016, eq. 16: A_t = sum_l (gamma lam)^l delta_{t+l}, the sum written out; and A_t + V_t."""
    length = len(rewards)
    delta = []
    for t in range(length):
        following = values[t + 1] if t + 1 < length else 0.0
        delta.append(np.float64(rewards[t]) + gamma * following - values[t])
    advantages = []
    for t in range(length):
        advantages.append(sum((gamma * lam) ** ahead * delta[t + ahead] for ahead in range(length - t)))
    return advantages, [a + v for a, v in zip(advantages, values)]


def rloo(sums: Row) -> Row:
    """Ahmadian et al. 2024, eq. 8, of one prompt: each summed reward less the mean of the others."""
    result = []
    for i, own in enumerate(sums):
        others = [x for j, x in enumerate(sums) if j != i]
        result.append(own - sum(others) / len(others))
    return result


def grpo(sums: Row, *, divide_by_std: bool) -> Row:
    """Shao et al. 2024, section 4.1.2, of one prompt (std with n - 1, plus 1e-4); Liu et al. 2025 leave the std out."""
    mean = sum(sums) / len(sums)
    std = np.sqrt(sum((x - mean) ** 2 for x in sums) / (len(sums) - 1))
    return [(x - mean) / (std + 1e-4) if divide_by_std else x - mean for x in sums]


def reinforce_pp(rewards: Row, *, gamma: float) -> Row:
    """Hu 2025, section 3: the discounted sum of rewards from each token on."""
    return [sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]


def policy_loss(
    logprobs: Row, old_logprobs: Row, advantages: Row, *, clip: float, clip_high: float | None, dual_clip: float | None
) -> tuple[Row, list[bool]]:
    """Schulman et al. 2017, figure 1, case by case; Yu et al. 2025 (clip_high); Ye et al. 2020, eq. 5 (dual_clip).

    Returns the losses, and where a clip holds the gradient back.
    """
    high = clip if clip_high is None else clip_high
    losses, active = [], []
    for new, old, advantage in zip(logprobs, old_logprobs, advantages):
        ratio = np.exp(min(max(np.float64(new) - np.float64(old), -20.0), 20.0))
        used = ratio
        if advantage > 0 and ratio > 1 + high:
            used = 1 + high
        if advantage < 0 and ratio < 1 - clip:
            used = 1 - clip
        if advantage < 0 and dual_clip is not None and ratio > dual_clip:
            used = dual_clip
        losses.append(-used * advantage)
        active.append(used != ratio)
    return losses, active


def value_loss(values: Row, old_values: Row, returns: Row, *, clip: float | None) -> tuple[Row, list[bool]]:
    """Ziegler et al. 2019 code: half the larger of two squared errors; and where the clipped one is the larger."""
    losses, active = [], []
    for value, old, target in zip(values, old_values, returns):
        plain = (np.float64(value) - target) ** 2
        held = plain
        if clip is not None and value > old + clip:
            held = (old + clip - target) ** 2
        if clip is not None and value < old - clip:
            held = (old - clip - target) ** 2
        losses.append(max(plain, held) / 2)
        active.append(bool(held > plain))
    return losses, active


def aggregate(rows: list[Row], how: str) -> float:
    """One number of a whole optimizer step: the mean over tokens, or over responses of each one's mean over tokens."""
    if how == "token_mean":
        return sum(sum(row) for row in rows) / sum(len(row) for row in rows)
    return sum(sum(row) / len(row) if row else 0.0 for row in rows) / len(rows)


def log_softmax(logits: Row) -> Row:
    largest = max(logits)
    log_sum = largest + math.log(sum(math.exp(x - largest) for x in logits))
    return [x - log_sum for x in logits]


def entropy(logits: Row) -> float:
    """Shannon 1948: - sum p log p, where 0 log 0 = 0."""
    return -sum(math.exp(logp) * logp for logp in log_softmax(logits) if logp > -math.inf)


def fixed_kl(coef: float) -> float:
    return coef


def adaptive_kl(coef: float, *, observed: float, target: float, episodes: int, horizon: int) -> float:
    """Ziegler et al. 2019, section 2.2, K_beta = episodes / horizon as in the code."""
    error = (observed - target) / target
    error = -0.2 if error < -0.2 else 0.2 if error > 0.2 else error
    return coef * (1 + error * episodes / horizon)


def learning_rate_share(schedule: str, update: int, updates: int, warmup: int) -> float:
    """update counts from 1, as the papers do. Linear: 1 - (update - 1) / updates (Ziegler et al. 2019 code)."""
    if update <= warmup:
        return update / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "inverse_sqrt":  # Vaswani et al. 2017, section 5.3, scaled to 1 at the end of the warm-up
        return math.sqrt(max(warmup, 1)) / math.sqrt(update)
    share = (update - warmup - 1) / (updates - warmup)
    return 1 - share if schedule == "linear" else (1 + math.cos(math.pi * share)) / 2
