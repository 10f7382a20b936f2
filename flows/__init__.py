"""Prefect's side: when the pipeline runs, where, within which limits, and what its UI shows.

DVC owns the stages and their order, MLflow what is deployable; nothing here repeats either.
"""

from deepspec.entry import quiet_environment

quiet_environment()  # before any module of ours imports Prefect
