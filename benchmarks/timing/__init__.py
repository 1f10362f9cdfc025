"""The timing harness: problems, providers, clocks, and the suites that combine them."""
