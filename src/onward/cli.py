"""The command line: ``python train.py ...``, ``onward ...``. Nothing heavy is imported until a run starts."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from onward import __version__
from onward.errors import ConfigError, DataError, OnwardError, Unsupported

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from omegaconf import DictConfig

    from onward.launch.job import JobResult
    from onward.launch.sweep import Sweep

#: Exit codes: a run that failed; a command line or config that cannot be run; what a shell gives for signals.
FAILED, INVALID, INTERRUPTED, TERMINATED = 1, 2, 130, 143


class Terminated(SystemExit):
    """SIGTERM arrived: unwinds the run like Ctrl-C does, so that it is closed as killed."""

    def __init__(self):
        super().__init__(TERMINATED)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 success; 1 a run failed; 2 the command line or config is not valid (nothing was computed);
    130 interrupted; 143 terminated.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with terminable():
            return dispatch(words)
    except OnwardError as error:
        return report(error)
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except SystemExit as error:
        if error.code == TERMINATED:
            say("terminated")
            return TERMINATED
        # Lightning turns Ctrl-C into exit code 1
        if isinstance(error.__context__, KeyboardInterrupt):
            say("interrupted")
            return INTERRUPTED
        raise


def dispatch(words: list[str]) -> int:
    """Choose between help, a tool, Hydra's own flags, one run and a sweep."""
    from hydra._internal.utils import get_args_parser

    from onward.compose import CONFIG_NAME, compose_run, explained, overlay_dirs, session
    from onward.help import help_text, scripts_dir, tools

    if words and words[0].isidentifier() and words[0] in tools():
        return run_tool(scripts_dir() / f"{words[0]}.py", words[1:])
    if "--version" in words:
        sys.stdout.write(f"onward {__version__}\n")
        return 0
    parser = get_args_parser()
    parser.error = refuse_flags
    args = parser.parse_intermixed_args(words)
    if args.help:
        sys.stdout.write(help_text(program(), overlay_dirs(args.config_dir)))
        return 0
    if args.experimental_rerun:
        raise ConfigError("--experimental-rerun", args.experimental_rerun, "resume=<run id> continues a run")
    name = args.config_name or CONFIG_NAME
    with session(args.config_dir, args.config_path) as hydra:
        if args.hydra_help:
            hydra.hydra_help(name, args_parser=parser, args=args)
        elif args.shell_completion:
            hydra.shell_completion(name, args.overrides)
        elif args.info:
            with explained(hydra, args.overrides, name):
                hydra.show_info(args.info, name, args.overrides)
        elif args.cfg:
            show_config(hydra, compose_run(hydra, args.overrides, name), args.cfg, args.package, args.resolve)
        elif args.multirun or "hydra.mode=MULTIRUN" in args.overrides:
            return sweep(hydra, name, args.overrides)
        else:
            return single(hydra, name, args.overrides)
    return 0


def show_config(hydra: Hydra, cfg: DictConfig, kind: str, package: str | None, resolve: bool) -> None:
    """Print a part of a composed config (``job``, ``hydra`` or ``all``) as YAML.

    Raises:
        ConfigError: no such package, or an interpolation that only a started run can resolve.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    HydraConfig.instance().set_config(cfg)
    OmegaConf.set_readonly(cfg.hydra, None)
    shown = hydra.get_sanitized_cfg(cfg, kind)
    if package not in (None, "_global_"):
        shown = OmegaConf.select(shown, package)
        if shown is None:
            raise ConfigError("--package", package, "a key of the config, as optimizer or algo.readout")
    if not OmegaConf.is_config(shown):
        sys.stdout.write(f"{shown}\n")
        return
    if resolve:
        try:
            OmegaConf.resolve(shown)
        except OmegaConfBaseException as error:
            known = f"values that are known before a run starts ({error.msg})"
            raise ConfigError("--resolve", error.full_key, known) from error
    header = f"# @package {package}\n" if package else ""
    sys.stdout.write(header + OmegaConf.to_yaml(shown))


def refuse_flags(message: str) -> None:
    """What argparse calls for flags it cannot read."""
    raise ConfigError("flags", message, "one of the flags that --help and --hydra-help list")


def program() -> str:
    """How the user calls us."""
    called = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else ""
    return f"python {called}" if called == "train.py" else "onward"


def run_tool(path: Path, words: list[str]) -> int:
    """Run a script as ``python scripts/<name>.py`` would."""
    previous = sys.argv
    sys.argv = [str(path), *words]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as error:
        if isinstance(error, Terminated):
            raise
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        sys.argv = previous
    return 0


# ---------------------------------------------------------------------- one run


class Run:
    """What Hydra calls with the composed config of a single run. A failure is kept here, and shown by the caller."""

    def __init__(self):
        self.error: Exception | None = None

    def __call__(self, cfg: DictConfig) -> float | None:
        from hydra.core.hydra_config import HydraConfig

        hydra = HydraConfig.get()
        directory = Path(hydra.runtime.output_dir)
        choices = {k: str(v) for k, v in hydra.runtime.choices.items() if not k.startswith("hydra")}
        try:
            from onward.app import execute

            return execute(cfg, list(hydra.overrides.task), choices, directory).value
        except Exception as error:  # noqa: BLE001 - reported by `single`
            self.error = error
            if isinstance(error, (ConfigError, DataError, Unsupported)):
                discard(directory)
            return None


def single(hydra: Hydra, name: str, overrides: list[str]) -> int:
    """Compose, check, run; or sweep, if a file says so (``hydra.mode: MULTIRUN``)."""
    from hydra.types import RunMode

    from onward.compose import compose_run, explained

    cfg = compose_run(hydra, overrides, name)
    if cfg.hydra.mode == RunMode.MULTIRUN:
        return sweep(hydra, name, overrides)
    if _searches(cfg):
        raise ConfigError("sweep", cfg.hydra.runtime.choices.get("sweep"), "-m beside it: a search is many runs")
    run = Run()
    with explained(hydra, overrides, name):
        hydra.run(name, run, [*overrides, "hydra.mode=RUN"])
    return report(run.error) if run.error is not None else 0


def discard(directory: Path) -> None:
    """Remove the folder of a run that was refused before it computed anything: only Hydra wrote there."""
    written = [p for p in directory.iterdir() if p.name != ".hydra" and p.suffix != ".log"]
    if written:
        return
    shutil.rmtree(directory)
    for parent in directory.parents[:2]:  # the day's folder, and runs/
        if any(parent.iterdir()):
            break
        parent.rmdir()


# ---------------------------------------------------------------------- a sweep


def sweep(hydra: Hydra, name: str, overrides: list[str]) -> int:
    """Check every job first; then run them all, whatever fails; then list the failures."""
    from onward.compose import expand
    from onward.launch.sweep import Sweep, compose_sweep

    overrides = [word for word in overrides if not word.startswith("hydra.mode=")]
    cfg = compose_sweep(hydra, name, overrides)
    settings = [word for word in overrides if word.startswith(("hydra.", "hydra/", "+hydra", "++hydra", "~hydra"))]
    jobs = expand(hydra, cfg)
    made = Sweep(hydra, cfg, name, fixed=settings, asked=overrides)
    if _searches(cfg):
        return search(made, jobs)
    cells = made.prepare(jobs)
    if cells:
        made.key = made.key_of(cells)
    if cells and _ours(cfg):
        made.pool()
        with made:
            for _ in made.run(cells):
                pass
    else:
        through_hydra(hydra, name, overrides, made)
    return report_sweep(made)


def _ours(cfg: DictConfig) -> bool:
    return str(cfg.hydra.launcher._target_).startswith("hydra_plugins.onward_launchers.")


def _searches(cfg: DictConfig) -> bool:
    return "sampler" in (cfg.get("sweep") or {})


def search(made: Sweep, cells: list[list[str]]) -> int:
    """Search every cell's space, train the best settings on the final seeds, and show what was found."""
    from onward.search.run import Search

    made.name = made.name.replace("sweep ·", "search ·", 1)
    search = Search(made, cells)
    search.run()
    if made.settings.view != "none":
        sys.stdout.write(f"{made.name}\n\n{search.report()}\nsweep  {made.directory}\n")
        sys.stdout.flush()
    report_failures(made, search.failures, len(made.results))
    return FAILED if search.failures or search.incomplete else 0


def through_hydra(hydra: Hydra, name: str, overrides: list[str], made: Sweep) -> None:
    """A sweep whose sweeper or launcher is Hydra's own or somebody else's plugin: they choose and carry the jobs."""
    from onward.compose import explained
    from onward.launch.hydra import SweepStopped, Task, collect

    pinned = str(made.directory).replace("\\", "\\\\").replace('"', '\\"')
    words = [*overrides, "hydra.mode=MULTIRUN", f'hydra.sweep.dir="{pinned}"']
    if not any("hydra.output_subdir" in word for word in words):
        words.append("hydra.output_subdir=null")  # the run writes its config itself
    with made, explained(hydra, words, name, multirun=True):
        try:
            hydra.multirun(name, Task(made), words)
        except SweepStopped:
            made.stopped = "sweep.fail_fast"
        finally:
            collect(made)


def report_sweep(made: Sweep) -> int:
    """Show what became of the jobs, list those that failed; the exit code."""
    from onward.launch.job import FAILED as LOST
    from onward.launch.job import KILLED
    from onward.launch.view import summary

    results = sorted(made.results, key=lambda result: result.index)
    if made.settings.view != "none":
        lines = [f"{made.name}\n", summary(results, time.monotonic() - made.began), f"sweep  {made.directory}"]
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
    failures = [result for result in results if result.status in (LOST, KILLED)]
    report_failures(made, failures, len(results))
    return FAILED if failures else 0


def report_failures(made: Sweep, failures: Sequence[JobResult], jobs: int) -> None:
    """List the jobs that failed, each with its reason and its traceback's place."""
    from onward.launch.job import KILLED

    if not failures:
        return
    left = "" if not made.stopped else f" ({made.stopped}: the others were not started)"
    say(f"\nerror: {len(failures)} of {jobs} jobs failed{left}:")
    for failure in failures:
        what = "killed: " if failure.status == KILLED else ""
        say(f"  job {failure.index}  {' '.join(failure.overrides)}\n      {what}{failure.reason}")
        if failure.status != KILLED and failure.directory:
            trace = Path(failure.directory) / "traceback.txt"
            if trace.is_file():
                say(f"      {trace}")


# ---------------------------------------------------------------------- messages and signals


def report(error: Exception) -> int:
    """One message for what the user can mend, the traceback for what only we can; the exit code."""
    from onward.compose import CompositionError

    if not isinstance(error, OnwardError) or _full_errors():
        traceback.print_exception(error)
    if isinstance(error, OnwardError):
        say(f"error: {error}")
    return INVALID if isinstance(error, (ConfigError, CompositionError)) else FAILED


def say(text: str) -> None:
    """Write a line to standard error."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _full_errors() -> bool:
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


@contextmanager
def terminable() -> Iterator[None]:
    """Raise :class:`Terminated` in the main thread on SIGTERM; put the previous handler back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum, frame):
        raise Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
