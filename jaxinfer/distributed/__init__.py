"""One model on several processes, usually one a host. Imports no jax before it is asked.

    with jaxinfer.distributed.join("10.0.0.1:9876", num_processes=2, process_id=number) as group:
        if group.process_id:
            jaxinfer.distributed.follow()
        else:
            llm = jaxinfer.LLM(model, mesh="tensor=2")

Process 0 schedules, and tells the others what to run; see docs/parallelism.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxinfer.distributed.group import Group


def join(coordinator: str, num_processes: int | None = None, process_id: int | None = None) -> Group:
    """Meet the other processes, and start jax with the devices of all; before anything else that uses jax.

    coordinator: HOST:PORT of process 0, the same on all, or "auto", where jax knows the cluster (TPU pods, SLURM,
    Kubernetes, Open MPI) and the other two are left out. Close the group, or use it in `with`. ValueError, in a line,
    where they do not come together.
    """
    from jaxinfer.distributed.group import join

    return join(coordinator, num_processes, process_id)


def follow() -> None:
    """Do what process 0 asks for until it closes the group; for every other process, in its main thread.

    A process that is lost ends this one: a line on standard error says which, and the exit status is not 0.
    """
    from jaxinfer.distributed.group import current

    group = current()
    if group is None or not group.process_id:
        raise ValueError("only a process other than 0 of a group follows; call jaxinfer.distributed.join first")
    with group.passing_signals_on():
        from jaxinfer.distributed.follower import follow  # which takes seconds to import

        follow(group)
