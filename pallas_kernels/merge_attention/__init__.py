"""Merging partial results of attention."""
