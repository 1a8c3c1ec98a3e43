"""Server reflection: lets tools such as grpcurl ask for the protocol. Imports no jax."""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from serving.generated import inference_pb2, models_pb2, open_inference_pb2


def add_reflection(server: Any, services: tuple[str, ...]) -> None:
    """Describe the services. Their files live in two pools (see scripts/generate_protos.py), and are shown as one."""
    pool, added = descriptor_pool.DescriptorPool(), set()

    def add(file: Any) -> None:
        if file.name not in added:
            added.add(file.name)
            for needed in file.dependencies:
                add(needed)
            pool.AddSerializedFile(file.serialized_pb)

    for module in (inference_pb2, models_pb2, open_inference_pb2, health_pb2, reflection_pb2):
        add(module.DESCRIPTOR)
    reflection.enable_server_reflection((*services, reflection.SERVICE_NAME), server, pool=pool)
