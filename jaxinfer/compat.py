"""What jaxinfer needs of jax and finds in no public place, each with its reason."""

from __future__ import annotations

from typing import Any


def detect_cluster(timeout_seconds: int) -> tuple[str | None, int | None, int | None, Any]:
    """What a cluster's own environment says of this process: coordinator HOST:PORT, processes, own number, device ids.

    Nones where no cluster is known. `jax.distributed.initialize` asks the same (TPU pods, SLURM, Kubernetes, Open MPI),
    but does not tell, and all processes have to be there before it is called; see distributed/group.py.
    """
    from jax._src.clusters import ClusterEnv

    return ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout_seconds)
