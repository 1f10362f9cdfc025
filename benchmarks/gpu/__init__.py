"""`python -m benchmarks gpu`: everything that only a GPU can show, in parts, each in processes of its own.

`job` divides the time, starts the processes and prints the table; `worker` is such a process; `log` holds what both write and
read; `kernels` knows the engines at hand; `cases` and `checks` are the correctness part, `runs` what a kernel must do besides
being right, `times` the timings.
"""
