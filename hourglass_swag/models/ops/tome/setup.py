"""Installs the package ``tome``: ``pip install -e .``, or the published way, ``python setup.py build develop``."""

from setuptools import setup

setup()
