"""A run that is killed at any moment goes on and ends as if nobody had killed it. By hand: kills.py."""

import pytest
from kills import Whole, killed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """ranks -> a run that nobody killed, made once; that of one rank without a launcher, as this is faster."""
    made = {}

    def run(ranks: int) -> Whole:
        if ranks not in made:
            words = ["launch=inline"] if ranks == 1 else []
            made[ranks] = Whole.make(tmp_path_factory.mktemp("whole"), ranks, *words)
        return made[ranks]

    return run


def test_ppo_that_is_killed_ends_with_the_same_weights_and_rows(whole, tmp_path):
    """Seed 5: a rank, while the sixth checkpoint is written."""
    assert killed(tmp_path, whole(1), seed=5, only="ppo", again=0.0) == []


@pytest.mark.slow
@pytest.mark.parametrize("stage, seed", [("sft", 17), ("reward_model", 16), ("ppo", 5)])
def test_any_stage_that_is_killed_on_two_ranks_ends_the_same(whole, tmp_path, stage, seed):
    """The seeds: a rank while a checkpoint is written, torch.distributed.run, the launcher while one is written."""
    assert killed(tmp_path, whole(2), seed, only=stage, again=0.0) == []


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_twenty_runs_that_are_killed_anywhere_end_the_same(whole, tmp_path, seed):
    assert killed(tmp_path, whole(2), seed) == []
