"""The whole list of faults, counted: the tables beside this file, and the tests that hold further ones where the
code is that meets them. Each stands for a distinct fault that a person or a machine can bring about."""

import ast
from pathlib import Path

import pytest
import test_config_faults
import test_data_faults
import test_model_faults
import test_run_faults

TESTS = Path(__file__).parents[1]
TABLES = {
    "settings": [test_config_faults.FAULTS],
    "data": [test_data_faults.FAULTS, test_data_faults.PATHS],
    "models": [test_model_faults.FILES, test_model_faults.WEIGHTS, test_model_faults.SCORERS],
    "a run": [test_run_faults.REWARDS, test_run_faults.PLACES],
}
ELSEWHERE = {  # the fault -> the test
    "some seventy mistakes of settings": "conf/test_errors.py::test_a_mistake_is_told_in_its_own_words",
    "faults of rewards' settings": "conf/test_rewards.py::test_a_mistake_is_told_in_its_own_words",
    "a module of the user's with a fault in it": (
        "conf/test_errors.py::test_a_module_of_the_user_that_cannot_be_imported_is_told_with_the_place"
    ),
    "a secret in the settings": (
        "unit/test_lineage.py::test_a_secret_in_the_settings_is_refused_before_anything_is_written"
    ),
    "faults of each file format": "unit/test_files.py::test_faults_of_files_are_one_line",
    "faults of each row format": "unit/test_formats.py::test_faults_say_what_was_expected_on_one_line",
    "a data set of the Hub that fails": "unit/test_hub.py::test_faults_are_one_line",
    "an empty side of the split": "unit/test_assemble.py::test_a_side_that_would_be_empty_stops_the_run",
    "reward and policy of different tokens": (
        "recipes/test_chain.py::test_a_reward_model_with_other_tokens_reads_the_texts"
    ),
    "the product of another stage": "recipes/test_own_model.py::test_inputs_of_the_wrong_kind_are_refused",
    "a product that lost a file": "recipes/test_chain.py::test_a_product_that_lost_a_file_is_made_again",
    "a loss that is not finite": "recipes/test_chain.py::test_a_loss_that_is_not_finite_stops_with_the_data_saved",
    "a reward function that answers wrongly": (
        "unit/test_reward_sources.py::test_a_function_that_fails_stops_the_stage_and_leaves_the_batch"
    ),
    "a coroutine that hangs": "unit/test_reward_sources.py::test_a_late_coroutine_is_given_up",
    "HTTP 500, malformed JSON, the wrong count": (
        "unit/test_reward_sources.py::test_an_endpoint_that_fails_is_told_in_its_own_words"
    ),
    "a slow endpoint": "unit/test_reward_sources.py::test_a_slow_endpoint_is_given_up",
    "an endpoint that is down": "unit/test_reward_sources.py::test_an_endpoint_that_is_not_there_is_named",
    "an endpoint that fails for a while": (
        "unit/test_reward_sources.py::test_what_may_mend_itself_is_asked_again_and_later_each_time"
    ),
    "a full disk while a checkpoint is written": (
        "unit/test_checkpoint.py::test_a_run_whose_disk_was_full_for_a_while_goes_on_and_ends_the_same"
    ),
    "a full disk while a row is written": (
        "unit/test_tracking.py::test_a_row_waits_for_room_on_a_full_disk_and_is_never_half_written"
    ),
    "a full disk while a log is written": "unit/test_launch.py::test_a_log_on_a_full_disk_holds_nobody_up",
    "a damaged checkpoint": (
        "unit/test_checkpoint.py::test_of_a_damaged_checkpoint_the_one_before_is_used_and_a_line_says_so"
    ),
    "a power cut while a product is put into place": (
        "unit/test_artifact.py::test_a_power_cut_between_any_two_steps_leaves_a_whole_product_or_none"
    ),
    "SIGTERM, SIGINT": "unit/test_launch.py::test_a_signal_lets_the_ranks_save_and_end_by_themselves",
    "a second signal": "unit/test_launch.py::test_a_second_signal_ends_the_ranks_now",
    "ranks that ignore a signal": (
        "unit/test_launch.py::test_ranks_that_do_not_end_when_asked_are_killed_after_the_grace"
    ),
    "SIGKILL of the launcher": "unit/test_launch.py::test_a_launcher_that_is_killed_leaves_no_process_behind",
    "SIGKILL of a rank": (
        "unit/test_launch.py::test_a_failing_rank_ends_the_stage_on_all_and_is_named_though_others_wait_for_it"
    ),
    "SIGKILL of PPO": "recipes/test_kills.py::test_ppo_that_is_killed_ends_with_the_same_weights_and_rows",
    "SIGKILL of a machine": "unit/test_machines.py::test_a_launcher_that_is_killed_ends_the_run_on_the_other_machine",
    "a machine that falls silent": (
        "unit/test_machines.py::test_an_end_that_sends_nothing_is_lost_though_it_is_connected"
    ),
    "a second run that wants the same product": (
        "unit/test_artifact.py::test_a_second_process_that_wants_the_product_waits_and_reuses_it"
    ),
    "W&B down at the start": "unit/test_wandb_sink.py::test_a_dead_server_means_offline_and_one_line",
    "W&B silent": "unit/test_wandb_sink.py::test_a_server_that_never_answers_holds_up_the_start_and_nothing_else",
    "W&B down on the way": "unit/test_wandb_sink.py::test_a_server_that_dies_on_the_way_slows_no_row_and_the_run_ends",
    "W&B that raises": "unit/test_tracking.py::test_a_failing_sink_costs_one_line_and_no_row",
}


def own_tests(module) -> int:
    """Tests of a file that are not one of its tables: each a fault of its own."""
    return sum(name.startswith("test_") and not hasattr(test, "pytestmark") for name, test in vars(module).items())


def test_there_are_more_than_sixty_faults_in_the_tables_alone():
    cases = [(kind, case) for kind, tables in TABLES.items() for table in tables for case in table]
    assert len(set(cases)) == len(cases) > 60
    assert {kind: sum(map(len, tables)) >= 9 for kind, tables in TABLES.items()} == dict.fromkeys(TABLES, True)
    assert own_tests(test_data_faults) + own_tests(test_run_faults) >= 10


@pytest.mark.parametrize("place", ELSEWHERE.values(), ids=ELSEWHERE)
def test_what_is_tested_elsewhere_is_there(place):
    file, _, name = place.partition("::")
    assert name in {getattr(node, "name", "") for node in ast.parse((TESTS / file).read_text("utf-8")).body}
