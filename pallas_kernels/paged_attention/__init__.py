"""Ragged paged attention: queries of many sequences over keys and values kept in pages."""
