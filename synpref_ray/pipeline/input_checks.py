"""What every job can tell before it starts anything: all that is wrong at once, and steps that no GPU would be given to."""

from collections.abc import Callable

from synpref_ray.errors import ConfigError, InputError, SynprefError


def check_each(*checks: Callable[[], object]) -> None:
    """Make every check, whatever the ones before it found.

    Raises:
        InputError: some of them failed; one line with what each said. A single failure is raised as it is.
    """
    found: list[SynprefError] = []
    for check in checks:
        try:
            check()
        except SynprefError as error:
            if str(error) not in map(str, found):
                found.append(error)
    if len(found) == 1:
        raise found[0]
    if found:
        raise InputError(f"{len(found)} things are wrong: " + "; ".join(f"({number}) {error}" for number, error in enumerate(found, start=1)))


def check_gpus(step: str, device: str, gpus_per_worker: float, needed: float = 0.0) -> None:
    """Check that Ray sets aside the GPUs that a worker uses: it hides all others from it.

    Args:
        needed: GPUs that a worker's model is spread over; 0: a share of one will do.

    Raises:
        ConfigError: they do not agree.
    """
    on_gpu = device.startswith(("cuda", "gpu"))
    if on_gpu and gpus_per_worker <= 0:
        raise ConfigError(f"{step}: device={device}, but num_gpus_per_worker=0: Ray would show its workers no GPU")
    if not on_gpu and gpus_per_worker > 0:
        raise ConfigError(f"{step}: num_gpus_per_worker={gpus_per_worker:g}, but device={device}: the GPUs would idle")
    if on_gpu and needed > 1 and gpus_per_worker != needed:
        raise ConfigError(f"{step}: tensor_parallel_size={needed:g} needs num_gpus_per_worker={needed:g}, found {gpus_per_worker:g}")
