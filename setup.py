"""Build of interp_nn; everything static is in pyproject.toml, and the wheel is pure Python."""

from setuptools import setup

setup()
