"""`python -m benchmarks gpu`: the checks and timings that need a GPU, in parts, each in processes of its own.

`job` divides the time, starts the processes and prints the table; `worker` is such a process; `log` is the record of both;
`kernels` knows the engines; `cases` and `checks` are the correctness part, `runs` the other checks, `timings` the timings.
"""
