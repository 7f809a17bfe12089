"""Real processes for the tests of a run's status: imports MLflow once, then forks one process per scenario.

Reads one JSON command a line: ``{"scenario", "out", ...}`` answers ``{"pid"}``, ``{"wait": pid}`` answers
``{"code"}``. Run with a scenario's JSON as the only argument, it is that scenario in a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from onward.errors import Diverged
from onward.tracking.backend import load_mlflow
from onward.tracking.run import Run, TrackingSettings

TAGS = {"algo": "forward_forward", "model": "mlp", "data": "digits", "seed": 0}


def start(out: Path, name: str = "forward_forward · mlp · digits · s0", **kwargs) -> Run:
    return Run.start(TrackingSettings(out), name=name, directory=out / "runs" / kwargs.pop("directory", "a"),
                     tags=TAGS, params={"algo": "forward_forward", "optimizer.lr": 0.001}, **kwargs)


def ready(out: Path, run: Run) -> None:
    run.log({"train/loss": 0.5}, 1)
    run.drain()
    (out / "ready").write_text(run.run_id)


def wait() -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        time.sleep(0.01)


def finish(out: Path, name: str = "r", **_) -> None:
    with start(out, name=name, directory=name) as run:
        run.log({"train/loss": 0.5, "test/accuracy": 0.95}, 3)


def fail(out: Path, **_) -> None:
    with start(out) as run:
        run.log({"train/loss": 0.5}, 1)
        raise ZeroDivisionError("a bug in the rule")


def diverge(out: Path, **_) -> None:
    with start(out) as run:
        run.log({"train/loss": 0.5}, 1)
        raise Diverged("train/loss is not finite at update 7")


def stay(out: Path, parent_id: str | None = None, **_) -> None:
    with start(out, parent_id=parent_id) as run:
        ready(out, run)
        wait()


def swallow(out: Path, **_) -> None:
    """As the Trainer does: Ctrl-C becomes sys.exit(1), and further ones are ignored."""
    with start(out) as run:
        ready(out, run)
        try:
            wait()
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            sys.exit(1)


def hide(out: Path, **_) -> None:
    """Somebody catches everything, and the body ends as if nothing had happened."""
    with start(out) as run:
        ready(out, run)
        try:
            wait()
        except BaseException:  # noqa: BLE001 - the worst case is what is tested
            return


def outage(out: Path, **_) -> None:
    """Killed outright while the store is out: what was kept must still arrive."""
    with start(out) as run:
        ready(out, run)
        from onward.tracking import sender

        def refuse(*_):
            raise OSError("connection refused")

        sender.apply = refuse
        run.log({"train/loss": 0.25}, 2)
        run.flush()
        while not (run.directory / "pending.jsonl").exists():
            time.sleep(0.01)
        (out / "kept").touch()
        wait()


SCENARIOS = {f.__name__: f for f in (finish, fail, diverge, stay, swallow, hide, outage)}


def play(command: dict) -> int:
    """The exit code as the command line gives it."""
    try:
        SCENARIOS[command.pop("scenario")](Path(command.pop("out")), **command)
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:
        return int(end.code or 0)
    except Exception:  # noqa: BLE001 - any failure is exit code 1
        return 1
    return 0


def main() -> None:
    if len(sys.argv) > 1:
        sys.exit(play(json.loads(sys.argv[1])))
    load_mlflow()
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 - once for all forked processes

    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(command["wait"], 0)[1])}
        else:
            pid = os.fork()
            if pid == 0:
                os._exit(play(command))
            answer = {"pid": pid}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
