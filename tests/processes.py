"""The processes below one, while some of them end."""

import psutil


def children_of(process: psutil.Process) -> dict[psutil.Process, str]:
    """Return the living processes below one with their command lines; one that ends meanwhile, or that nobody has reaped, is left out."""
    commands = {}
    for child in process.children(recursive=True):
        try:
            commands[child] = " ".join(child.cmdline())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return commands
