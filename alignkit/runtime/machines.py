"""The launchers of one run on several machines, one on each, and what they tell each other.

Machine 0 runs the recipe and does all that is done once: locks, store, job files, summary. It listens at
launch.rendezvous; the others report there and start their share of each stage's ranks when they are told to:

    machine k -> 0    {"machine", "facts"}    once: who it is and how it was started
                      {"signal", "again"}     it was asked to end, which then holds for all
                      {"ended", "reports"}    its ranks of the stage have ended
    machine 0 -> k    {"stage", "port", "num_parameters"}    start ranks for this job file
                      {"kill"}                end them now
                      {"end", "words"}        the run is over with this exit code
"""

import importlib.metadata
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignkit import __version__
from alignkit.data.corpus import fingerprint_of
from alignkit.errors import UserError
from alignkit.runtime.config import RunConfig, leaves
from alignkit.runtime.link import Link, Lost, address, listen
from alignkit.runtime.settings import LaunchSettings
from alignkit.runtime.signals import Noted, Stopped, relay
from alignkit.runtime.sources import files_of, with_sources

FILE = "file "  # begins the name of what is said of a file
OWN = ("name", "launch.machine", "launch.rendezvous", "launch.patience")  # settings that may differ between machines


class Team:
    """Machine 0's hold on the others; on a single machine there are none. codes: how their ranks ended, None: run."""

    def __init__(self) -> None:
        self.links: dict[int, Link] = {}
        self.codes: dict[int, int | None] = {}
        self.reports: list[dict[str, Any]] = []

    def gather(self, launch: LaunchSettings, own: dict[str, Any]) -> None:
        """Wait until all other machines have reported, with the same facts. Raises UserError, or Stopped."""
        if launch.machines == 1:
            return
        if fault := differences(0, own, own):
            raise UserError(fault)
        try:
            listening = listen(*address(launch.rendezvous))
        except OSError as error:
            raise UserError(f"launch.rendezvous={launch.rendezvous}: cannot listen there: {error.strerror}") from None
        end, waiting = time.monotonic() + launch.patience, []
        with listening:
            print(f"machine 0 of {launch.machines}: waiting for the others at {launch.rendezvous}", flush=True)
            while missing := [k for k in range(1, launch.machines) if k not in self.links]:
                if time.monotonic() > end:
                    names = " and ".join(f"launch.machine={k}" for k in missing)
                    raise UserError(
                        f"launch.machines={launch.machines}: nothing was heard of {names} at launch.rendezvous="
                        f"{launch.rendezvous} within launch.patience={launch.patience:g} s; start the same command "
                        "there too, each with its number"
                    )
                with suppress(TimeoutError):
                    waiting.append(Link(listening.accept()[0], _pass_on))
                waiting = [link for link in waiting if not self._admitted(link, own)]
                self._drop_lost()

    def _admitted(self, link: Link, own: dict[str, Any]) -> bool:
        """Whether a connection needs no more waiting: it has said who it is, or is gone."""
        try:
            hello = link.next()
        except Lost:
            return True
        if hello is None:
            return False
        if not isinstance(hello.get("machine"), int) or not isinstance(hello.get("facts"), dict):
            link.close()
        elif fault := differences(hello["machine"], hello["facts"], own):
            link.send(end=2, words=fault)
            link.close()
            raise UserError(fault)
        elif hello["machine"] in self.links:
            link.send(end=2, words=f"launch.machine={hello['machine']} is taken: give each machine its own number")
            link.close()
        else:
            self.links[hello["machine"]] = link
        return True

    def _drop_lost(self) -> None:
        for machine, link in list(self.links.items()):
            with suppress(Lost):
                link.next()
                continue
            del self.links[machine]  # it may be started again

    def begin(self, job_file: Path, num_parameters: int | None) -> int | None:
        """Tell the others to start their ranks of a stage; returns the port at which all ranks meet, None on a single
        machine."""
        if not self.links:
            return None
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        self.codes, self.reports = dict.fromkeys(self.links), []
        for link in self.links.values():
            link.send(stage=str(job_file), port=port, num_parameters=num_parameters)
        return port

    def busy(self) -> bool:
        """Whether ranks elsewhere still run, by all that was heard so far."""
        for machine in [k for k, code in self.codes.items() if code is None]:
            try:
                while message := self.links[machine].next():
                    if "ended" in message:
                        self.codes[machine] = message["ended"]
                        self.reports += message["reports"]
            except Lost as lost:
                self.codes[machine] = 1
                words = f"machine {machine} was lost: {lost}"
                self.reports.append({"kind": "lost", "rank": None, "message": words, "time": time.time()})
        return None in self.codes.values()

    @property
    def failed(self) -> bool:
        """Whether ranks elsewhere have failed, or a machine is lost."""
        return any(self.codes.values())

    @property
    def whole(self) -> bool:
        """Whether all ranks elsewhere have ended well."""
        return all(code == 0 for code in self.codes.values())

    def end_stage(self) -> None:
        """End what still runs elsewhere and hear what the others have to report."""
        end = time.monotonic() + 10.0
        for machine in [k for k, code in self.codes.items() if code is None]:
            self.links[machine].send(kill=True)
        while self.busy() and time.monotonic() < end:
            time.sleep(0.05)

    def close(self, code: int, words: str) -> None:
        """Tell the others that the run is over."""
        for link in self.links.values():
            link.send(end=code, words=words)
        for link in self.links.values():
            link.close()


def _pass_on(number: int, again: bool) -> None:
    print(f"another machine received {signal.Signals(number).name}", flush=True)
    relay(number, again)


def join(launch: LaunchSettings, facts: dict[str, Any], noted: Noted) -> Link:
    """Report to machine 0. Raises UserError if it does not answer in time, Stopped after a signal."""
    end = time.monotonic() + launch.patience
    print(f"machine {launch.machine} of {launch.machines}: reporting to {launch.rendezvous}", flush=True)
    while True:
        try:
            link = Link(socket.create_connection(address(launch.rendezvous), timeout=5.0))
            break
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"launch.rendezvous={launch.rendezvous}: no answer of machine 0 within launch.patience="
                    f"{launch.patience:g} s ({error.strerror or error}); start the same command there with "
                    "launch.machine=0, and let rendezvous be its address"
                ) from None
        if noted.number:
            raise Stopped(noted.number)
        time.sleep(0.3)
    link.send(machine=launch.machine, facts=facts)
    return link


def facts_of(config: RunConfig, raw: dict[str, Any]) -> dict[str, Any]:
    """What must be the same on all machines, flat: settings, the user's code, data and models, versions; or the fault
    that hinders to find it."""
    try:
        facts = {name: value for name, value in leaves(with_sources(raw)) if name not in OWN}
        facts["digest of the data"] = fingerprint_of(config.data, config.seed)
        facts |= {f"{FILE}{name}": content for name, content in files_of(config)}
    except UserError as error:
        return {"fault": str(error)}
    return {**facts, "version of alignkit": __version__, "version of torch": importlib.metadata.version("torch")}


def differences(machine: int, there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """What another machine was started with otherwise, as one line; None: nothing."""
    if "fault" in there:
        return f"on machine {machine}: {there['fault']}"
    names = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    if not names:
        return None
    if files := [name for name in names if name.startswith(FILE)]:
        name, more = files[0].removeprefix(FILE), f", and {len(files) - 1} more files" * (len(files) > 1)
        contents = " there, ".join(str(facts.get(files[0], "missing")) for facts in (there, here))
        return (
            f"on machine {machine} another file than on machine 0: {name} ({contents} here){more}: its ranks would "
            "read other data or another model; copy it there, or keep it where all machines see it"
        )
    listed = "; ".join(f"{name}: {there.get(name)} there, {here.get(name)} here" for name in names[:4])
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (
        f"launch.machine={machine} was started otherwise than machine 0: {listed}{more}; start the same command there"
    )
