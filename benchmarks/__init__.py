"""Measurements: the main job (`demo`), timings of the operator against its rivals (`run`), and their records."""
