"""Experiments: each trains a network, explains it exactly, and writes figures and a record.

Run one as `python -m benchmarks.experiments.NAME --output DIR [--seed N] [--quick]`.
"""
