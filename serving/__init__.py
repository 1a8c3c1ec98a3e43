"""The server over the engine, gRPC and HTTP: `python -m serving`."""
