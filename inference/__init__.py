"""Batched generation over slots whose key-value cache lives across the turns of an episode."""

from data.replies import Trie
from inference.engine import Engine
from inference.lookup import LookupConfig
from inference.results import Completion, ContextOverflow, Stats
from inference.sampling import SamplingConfig

__all__ = [
  'Completion', 'ContextOverflow', 'Engine', 'LookupConfig', 'SamplingConfig', 'Stats', 'Trie']
