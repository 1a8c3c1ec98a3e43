"""The HTTP face of the server: OpenAI's routes, metrics and a page, over the same Frontend as gRPC."""
