"""Benchmarks of accuracy, speed and memory; the package does not depend on them."""
