"""Started by torchrun or by Slurm: which of the tasks works, and what it is told about machines and ranks."""

import pytest

from alignkit.errors import UserError
from alignkit.runtime import outer
from alignkit.runtime.outer import Outer, find_outer, first_host, is_extra_task, tasks_per_machine, with_outer

TORCHRUN = {
    "RANK": "4",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "SLURM_PROCID": "0",
    "SLURM_NNODES": "2",
}
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_NODELIST": "gpu01",
    "SLURM_NNODES": "9",
    "SLURM_NTASKS": "99",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
PLAIN = {"processes": 1, "machines": 1, "machine": 0, "rendezvous": None}


@pytest.fixture
def around(monkeypatch):
    """Pretend that these variables, and no others of a launcher, are set."""

    def put(**variables: str) -> None:
        monkeypatch.setattr(outer.os, "environ", variables)

    return put


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("node003", "node003"),
        ("node[003-005,9],login1", "node003"),
        ("login1,node[003-005]", "login1"),
        ("a[9,10-11]-ib", "a9-ib"),
        ("rack[1-2]node[04,06]", "rack1node04"),
        ("gpu-a.example.org,gpu-b.example.org", "gpu-a.example.org"),
    ],
)
def test_first_host_of_slurms_list(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize("layout, tasks", [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,2", [1, 2])])
def test_slurms_tasks_of_each_machine(layout, tasks):
    assert tasks_per_machine(layout) == tasks


@pytest.mark.parametrize("call, text", [(first_host, ""), (tasks_per_machine, "4(y2)")])
def test_what_slurm_says_and_cannot_be_read_is_an_error(call, text):
    with pytest.raises(UserError, match="cannot be read: '.*'; set launch"):
        call(text)


def test_without_a_launcher_around_nothing_changes(around):
    around(SLURM_JOB_ID="7", SLURM_NTASKS="4")  # the shell of salloc
    assert with_outer({"launch": PLAIN}) == {"launch": PLAIN}
    assert not is_extra_task()


def test_torchrun_is_taken_over_also_inside_slurm():
    assert find_outer(TORCHRUN) == Outer(local=0, tasks=4, machine=1, machines=2, rendezvous="node1:29501")
    assert find_outer({"RANK": "1", "WORLD_SIZE": "2"}) == Outer(1, 2, 0, 1, "localhost:29501")


def test_a_slurm_step_is_taken_over_by_its_own_numbers_not_by_those_of_the_job():
    assert find_outer(SRUN) == Outer(local=1, tasks=4, machine=1, machines=2, rendezvous="gpu07:19563")


def test_ports_of_two_steps_of_a_job_and_of_two_jobs_differ():
    changes = [{}, {"SLURM_STEP_ID": "4"}, {"SLURM_JOB_ID": "123457"}]
    ports = [int(find_outer(SRUN | change).rendezvous.split(":")[1]) for change in changes]
    assert len(set(ports)) == 3
    assert all(15000 <= port < 25000 for port in ports)


def test_on_each_machine_the_first_task_works_and_the_others_end_at_once(around):
    around(**SRUN)
    assert is_extra_task()
    around(**{**SRUN, "SLURM_LOCALID": "0"})
    assert not is_extra_task()
    around(**TORCHRUN)
    assert not is_extra_task()
    around(**{**TORCHRUN, "LOCAL_RANK": "2"})
    assert is_extra_task()


def test_what_the_settings_say_goes_first(around):
    around(**TORCHRUN)
    theirs = {"processes": 4, "machines": 2, "machine": 1, "rendezvous": "node1:29501"}
    assert with_outer({"seed": 1, "launch": PLAIN}) == {"seed": 1, "launch": theirs}
    assert with_outer({"launch": PLAIN | {"processes": 3}})["launch"] == theirs | {"processes": 3}
    assert with_outer({"launch": PLAIN | {"rendezvous": "b:1"}})["launch"] == theirs | {"rendezvous": "b:1"}
    assert with_outer({"launch": PLAIN | {"machines": 2, "rendezvous": "b:1"}})["launch"] == theirs | {
        "rendezvous": "b:1"
    }
    own = {"processes": 3, "machines": 3, "machine": 2, "rendezvous": "c:1"}
    assert with_outer({"launch": own})["launch"] == own


def test_one_task_on_each_machine_leaves_the_number_of_ranks_to_the_settings(around):
    one = {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    around(**{**SRUN, **one})
    launch = with_outer({"launch": PLAIN | {"processes": 8}})["launch"]
    assert (launch["processes"], launch["machines"], launch["machine"]) == (8, 2, 1)


def test_one_machine_needs_no_rendezvous(around):
    around(RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    assert with_outer({"launch": PLAIN})["launch"] == PLAIN | {"processes": 2}


def test_a_batch_script_without_srun_has_one_task(around):
    around(SLURM_PROCID="0", SLURM_NTASKS="4", SLURM_NNODES="1")
    assert with_outer({"launch": PLAIN})["launch"] == PLAIN | {"processes": 4}
    around(SLURM_PROCID="0", SLURM_NTASKS="4", SLURM_NNODES="2")
    with pytest.raises(UserError, match="2 machines, but the command was started on the first alone: start it with sr"):
        is_extra_task()


@pytest.mark.parametrize("variables", [{**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4,3"}, {**TORCHRUN, "WORLD_SIZE": "7"}])
def test_machines_with_different_numbers_of_tasks_are_refused(variables):
    with pytest.raises(UserError, match="equally many on each"):
        find_outer(variables)
