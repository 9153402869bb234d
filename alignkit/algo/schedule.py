"""Learning rates over a run, as a share of their peak: a function of the iteration alone, so nothing to save."""

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine", "inverse_sqrt"]


def learning_rate_share(schedule: Schedule, iteration: int, iterations: int, warmup: int) -> float:
    """Share of the peak in iteration 0 .. iterations - 1; the first `warmup` rise in a line from 1 / warmup to 1.

        after them, at share s = (iteration - warmup) / (iterations - warmup) of what is left:
        constant 1;  linear 1 - s;  cosine (1 + cos(pi s)) / 2;  inverse_sqrt sqrt(max(warmup, 1) / (iteration + 1))

    Source: linear: Ziegler et al. 2019 code (1 - (update - 1) / updates); warm-up from a tenth over 10 iterations, then
    constant: Ouyang et al. 2022 (InstructGPT), arXiv:2203.02155, appendix C.4; cosine, to 0: Loshchilov and Hutter
    2017, arXiv:1608.03983, eq. 5; inverse_sqrt: Vaswani et al. 2017, arXiv:1706.03762, section 5.3.
    Tests: test_schedule.py::test_every_schedule_rises_to_its_peak_and_then_never_rises,
           test_against_numpy.py::test_learning_rates
    """
    if iteration < warmup:
        return (iteration + 1) / warmup
    done = (iteration - warmup) / max(iterations - warmup, 1)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if schedule == "inverse_sqrt":
        return math.sqrt(max(warmup, 1) / (iteration + 1))
    raise ValueError(f"schedule must be constant, linear, cosine or inverse_sqrt, got {schedule!r}")
