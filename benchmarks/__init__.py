"""Benchmarks, and the baseline that they are measured against."""
