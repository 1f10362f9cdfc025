"""`python -m benchmarks gpu`: the checks and timings that need a GPU, in parts, each in processes of its own."""
