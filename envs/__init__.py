"""Environments: tasks in splits, played step by step."""

from envs.base import SUITES, get_suite

__all__ = ['SUITES', 'get_suite']
