"""Starts the ranks of one stage on this machine: torch.distributed.run with its own words on a failed rank left out
(the launcher tells the cause in one line) and with no rank left behind if the launcher dies.

    python -m alignkit.runtime.group REPORT.json --nproc-per-node 2 ... -m alignkit.runtime.worker job.json

How each failed rank ended goes into REPORT.json; a rank that was killed has no other witness.
"""

import ctypes
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def die_with_parent(signal_number: int) -> None:
    """Ask the kernel to signal this process when its parent ends, however that ends (Linux; elsewhere a no-op). The
    parent may have ended before this could be asked: it left its number in ALIGNKIT_PARENT."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal_number)  # PR_SET_PDEATHSIG
        if os.environ.get("ALIGNKIT_PARENT", str(os.getppid())) != str(os.getppid()):
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run the group; exit 1 if a rank failed."""
    die_with_parent(signal.SIGTERM)
    os.environ["ALIGNKIT_PARENT"] = str(os.getpid())  # for the ranks
    logging.disable(logging.ERROR)
    report, *words = sys.argv[1:]
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run

    try:
        run(words)
    except ChildFailedError as failed:
        _write(report, [{"rank": r, "code": f.exitcode, "time": f.timestamp} for r, f in failed.failures.items()])
        sys.exit(1)
    except SignalException as stop:
        sys.exit(128 + int(stop.sigval))
    except Exception as error:  # of torch.distributed.run itself: a port in use, a machine that cannot be reached
        _write(report, [{"rank": None, "message": f"{type(error).__name__}: {error}", "time": time.time()}])
        sys.exit(1)


def _write(report: str, entries: list[dict[str, Any]]) -> None:
    fresh = Path(f"{report}.new")
    fresh.write_text(json.dumps(entries), encoding="utf-8")
    fresh.replace(report)


if __name__ == "__main__":
    main()
