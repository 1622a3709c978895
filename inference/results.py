"""What an engine hands back: finished turns, and what it has counted."""

import dataclasses

import numpy as np


class ContextOverflow(Exception):
  """The turn cannot fit into the slot; the slot is as it was before."""


@dataclasses.dataclass(frozen=True)
class Completion:
  """One finished model call.

  Attributes:
    slot: index of the slot.
    tokens: int32 [m], sampled; the stop token is included where one was sampled.
    logprobs: float32 [m], natural logarithms under the model's own distribution (temperature 1).
    stop_reason: 'stop' (a stop token) or 'length' (`max_new_tokens` reached).
    prefilled_tokens: the turn's new tokens, before the first sampled one.
    prompt_tokens: all tokens the first sampled one was conditioned on, cached ones included.
    copied_tokens: new tokens that were not computed, as their keys and values were found in another
      conversation.
  """

  slot: int
  tokens: np.ndarray
  logprobs: np.ndarray
  stop_reason: str
  prefilled_tokens: int
  prompt_tokens: int
  copied_tokens: int = 0


@dataclasses.dataclass
class Stats:
  """Counts since the engine was made (or told to `forget`).

  Every new token of a conversation is either prefilled or copied, once. Seconds of calls that
  compiled are in `compile_s` only. What is padding or idle takes no time where a CPU's own kernels
  multiply (`models.native`).
  """

  prefilled: int = 0
  prefill_computed: int = 0  # prefilled tokens and their padding
  generated: int = 0
  decode_computed: int = 0  # rows times steps and their tokens, idle rows included
  decoded: int = 0  # tokens of them that were wanted
  prefill_dispatches: int = 0
  decode_dispatches: int = 0
  prefill_s: float = 0.0
  decode_s: float = 0.0
  compile_s: float = 0.0
  traces: int = 0
  copied: int = 0  # tokens whose keys and values were found in another conversation
  copy_dispatches: int = 0
  copy_s: float = 0.0
  verified: int = 0  # steps of slots that draft, also those that found nothing to draft
  drafted: int = 0  # tokens of those drafts
  accepted: int = 0  # of them the model's own choice

  @property
  def dispatches(self) -> int:
    return self.prefill_dispatches + self.copy_dispatches + self.decode_dispatches

  @property
  def padded_share(self) -> float:
    """Share of the prefilled positions that was padding."""
    return 1 - self.prefilled / self.prefill_computed if self.prefill_computed else 0.0

  @property
  def idle_share(self) -> float:
    """Share of the decoded positions whose slot was done or empty, or whose draft was rejected."""
    return 1 - self.decoded / self.decode_computed if self.decode_computed else 0.0

  @property
  def accepted_per_step(self) -> float:
    """Tokens of a draft that were accepted, a verifying step: so many come with the usual one."""
    return self.accepted / self.verified if self.verified else 0.0

  def as_dict(self) -> dict[str, float]:
    derived = ('dispatches', 'padded_share', 'idle_share', 'accepted_per_step')
    return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}
