"""What every job script shares: the command line, exit codes, the run folder, Ray, and the closing lines."""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TypeVar

from synpref_ray.config import Settings, load_config
from synpref_ray.credentials import redact
from synpref_ray.errors import ConfigError, InputError, SynprefError, WaitingError
from synpref_ray.pipeline.cluster import RayConfig, ray_session
from synpref_ray.pipeline.settings_help import help_lines
from synpref_ray.reporting.run import Run
from synpref_ray.tables.garbage import RUN_LEASE
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.storage import OBJECT_STORAGE_ERRORS, STORAGE_ERRORS, Storage

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_WAITING = 3
"""Nothing failed: people must do something first, and the last lines say what. A job that comes after this one must not start yet."""


class JobConfig(Settings):
    """Settings every job has."""

    workspace: str = "workspace"  # ours: a folder beside the user's data, or an s3:// prefix
    """Where all tables, models and records of the pipeline lie."""
    ray: RayConfig = RayConfig()

    @property
    def storage(self) -> Storage:
        """The workspace as storage."""
        return Storage(self.workspace)


ConfigT = TypeVar("ConfigT", bound=JobConfig)


@dataclass(frozen=True)
class Arguments:
    """A parsed command line."""

    verb: str | None
    config: str | None
    overrides: tuple[str, ...]
    dry_run: bool


def parse_arguments(argv: Sequence[str], verbs: Sequence[str] = ()) -> Arguments:
    """Read `[VERB] [--config FILE] [key=value …] [--dry-run]`.

    Raises:
        ConfigError: anything else is on the line, or a verb is missing or unknown.
    """
    verb: str | None = None
    config: str | None = None
    dry_run = False
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--dry-run":
            dry_run = True
        elif word == "--config" or word.startswith("--config="):
            config = word.partition("=")[2] or next(words, None)
            if not config:
                raise ConfigError("--config needs a file")
        elif word.startswith("-"):
            raise ConfigError(f"unknown option {word}; usage: {'VERB ' if verbs else ''}[--config FILE] [key=value ...] [--dry-run]")
        elif "=" in word:
            overrides.append(word)
        elif verbs and verb is None and word in verbs:
            verb = word
        else:
            raise ConfigError(f"expected {'one of ' + ', '.join(verbs) + ' or ' if verbs else ''}key=value, found {word!r}")
    if verbs and verb is None:
        raise ConfigError(f"name what to do: {', '.join(verbs)}")
    return Arguments(verb, config, tuple(overrides), dry_run)


def _start_run(storage: Storage, name: str, config: JobConfig) -> Run:
    """Make the run folder, a job's first write: whether the workspace can be written shows here."""
    try:
        return Run(storage, name, config)
    except OSError as error:
        raise InputError(f"cannot write to the workspace {storage.url}: {error}") from None


def run_job(
    name: str,
    argv: Sequence[str],
    config_class: type[ConfigT],
    body: Callable[[ConfigT, Run], str],
    *,
    check: Callable[[ConfigT], None] | None = None,
    preview: Callable[[ConfigT], str] | None = None,
    plan: Callable[[ConfigT], str] | None = None,
    usage: str | None = None,
) -> int:
    """Run a job and return its exit code.

    0: done, or nothing to do; 2: bad usage, config or input (one line, no traceback); 3: it waits for people; 1: anything else.

    Args:
        body: does the work and returns the closing table; `run.metrics` becomes metrics.json.
        check: validates inputs without a GPU; what `--dry-run` does after the config and the plan.
        plan: says what would be done, without a GPU and whether or not the inputs are there yet; printed by `--dry-run`.
        preview: a closer look at the inputs, for `--dry-run` alone, and what it found.
        usage: printed for `--help`.
    """
    return _run(
        name, argv, config_class, {"": body}, check, usage, plan=plan, preview=preview, session=lambda config: ray_session(config.ray, config.storage)
    )


def run_verb(
    name: str,
    argv: Sequence[str],
    config_class: type[ConfigT],
    bodies: Mapping[str, Callable[[ConfigT, Run], str]],
    *,
    check: Callable[[ConfigT], None] | None = None,
    usage: str | None = None,
) -> int:
    """Run a job that does one of several things, named by the first word, in this process alone (no Ray); see `run_job`."""
    return _run(name, argv, config_class, bodies, check, usage, session=lambda _: nullcontext())


def run_reader(
    name: str, argv: Sequence[str], config_class: type[ConfigT], bodies: Mapping[str, Callable[[ConfigT], str]], *, usage: str | None = None
) -> int:
    """Run a job that only reads the workspace (no Ray, no run folder, nothing written) and return its exit code: 0, 2 or 1 as `run_job`'s."""
    if any(word in ("-h", "--help") for word in argv):
        _print_help(name, config_class, [verb for verb in bodies if verb], usage)
        return EXIT_DONE
    try:
        arguments = parse_arguments(argv, [verb for verb in bodies if verb])
        config = load_config(config_class, arguments.config, arguments.overrides)
        print(bodies[arguments.verb or ""](config))  # noqa: T201  # the job's summary
    except (SynprefError, *OBJECT_STORAGE_ERRORS) as error:
        _print_error(name, error)
        return EXIT_USAGE
    return EXIT_DONE


def _print_help(name: str, config_class: type[JobConfig], verbs: Sequence[str], usage: str | None) -> None:
    print(usage or "")  # noqa: T201  # asked for
    print(f"usage: python jobs/{name}.py {'VERB ' if verbs else ''}[--config FILE] [key=value ...] [--dry-run]\n")  # noqa: T201
    print("settings, their defaults and meanings:")  # noqa: T201
    print("\n".join(help_lines(config_class)))  # noqa: T201


def _print_error(name: str, error: BaseException) -> None:
    """Print the one clear line of an error that the user can mend."""
    where = "" if isinstance(error, SynprefError) else "object storage: "  # else credentials, bucket or network
    print(f"{name}: {where}{redact(' '.join(str(error).split()))}", file=sys.stderr)  # noqa: T201


@contextmanager
def _recorded(run: Run) -> Iterator[None]:
    """Leave in the run's events why it ended early, whatever the reason (SIGTERM, which `ray job stop` sends, arrives as SystemExit)."""
    try:
        yield
    finally:
        error = sys.exc_info()[1]
        if error is not None:
            with suppress(*STORAGE_ERRORS):  # the first error is the one to tell
                run.stop(error)


def _run(
    name: str,
    argv: Sequence[str],
    config_class: type[ConfigT],
    bodies: Mapping[str, Callable[[ConfigT, Run], str]],
    check: Callable[[ConfigT], None] | None,
    usage: str | None,
    *,
    session: Callable[[ConfigT], AbstractContextManager[None]],
    preview: Callable[[ConfigT], str] | None = None,
    plan: Callable[[ConfigT], str] | None = None,
) -> int:
    verbs = [verb for verb in bodies if verb]
    if any(word in ("-h", "--help") for word in argv):
        _print_help(name, config_class, verbs, usage)
        return EXIT_DONE
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, force=True)
    for noisy in ("httpx", "transformers", "sentence_transformers", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        arguments = parse_arguments(argv, verbs)
        config = load_config(config_class, arguments.config, arguments.overrides)
        if arguments.dry_run and plan is not None:
            print(plan(config))  # noqa: T201  # before the check: what is not there yet is planned for, too
        if check is not None:
            check(config)
        if arguments.dry_run:
            if preview is not None:
                print(preview(config))  # noqa: T201  # the job's summary
            print(f"{name}: config and inputs are valid")  # noqa: T201  # the job's summary
            return EXIT_DONE
        storage = config.storage
        run = _start_run(storage, name, config)
        code = EXIT_DONE
        alive = Lease(storage, f"{run.folder}/{RUN_LEASE}")  # jobs/clean.py removes nothing while another job runs
        with (
            alive,
            _recorded(run),
            session(config),
            _recorded(run),
        ):  # within too: `ray job stop` leaves three seconds, and leaving a cluster may take them
            try:
                summary = bodies[arguments.verb or ""](config, run)
            except WaitingError as waiting:
                summary, code = f"{name} waits: {waiting}", EXIT_WAITING
                run.event("wait", message=str(waiting))
            run.finish()
    except (SynprefError, *OBJECT_STORAGE_ERRORS) as error:
        _print_error(name, error)
        return EXIT_USAGE
    except (KeyboardInterrupt, SystemExit):
        print(f"{name}: stopped; run it again to go on where it is", file=sys.stderr)  # noqa: T201
        raise
    print(summary)  # noqa: T201  # the job's summary
    print(f"run: {storage.join(run.folder)}")  # noqa: T201  # the job's last line
    return code
