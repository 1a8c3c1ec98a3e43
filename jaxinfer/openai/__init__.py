"""OpenAI's HTTP formats, for the batch job and the server: request bodies in, answers out. Imports no jax."""
