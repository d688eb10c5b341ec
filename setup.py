"""Metadata is in pyproject.toml; this file is the place of the native build."""

from setuptools import setup

setup()
