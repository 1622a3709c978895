"""Batched generation over slots whose key-value cache lives across the turns of an episode."""

from inference.engine import Completion, ContextOverflow, Engine, Stats
from inference.sampling import SamplingConfig

__all__ = ['Completion', 'ContextOverflow', 'Engine', 'SamplingConfig', 'Stats']
