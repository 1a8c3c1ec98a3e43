"""Flash attention: whole sequences, keys and values in one piece."""
