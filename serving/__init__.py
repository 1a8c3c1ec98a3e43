"""The gRPC service over the engine: `python -m serving`."""
