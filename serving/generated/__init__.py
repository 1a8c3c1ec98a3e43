"""Stubs of protos/jaxinfer/v1, made by scripts/generate_protos.py; for protobuf 6.33 and later, 7 included."""
