"""Grouped matrix product: consecutive rows, each group of them times a matrix of its own."""
