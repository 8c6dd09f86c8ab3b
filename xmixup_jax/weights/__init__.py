"""Finds, reads and writes weights."""
