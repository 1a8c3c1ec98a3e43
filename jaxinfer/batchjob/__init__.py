"""The parts of `python -m jaxinfer.run`: reading lines, keeping results, feeding the engine. Imports no jax."""
