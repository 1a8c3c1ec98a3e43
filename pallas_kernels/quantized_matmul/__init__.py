"""Rows times a matrix of whole numbers and scales."""
