"""Several adapters over one frozen base: each row of a batch has its own.

Side by side along the rank they are one adapter, and a row's gates let the columns of its own pass.
The products of the base are those of one model, and a step reads each adapter once, however many
rows have it: each row's own factors, gathered, would be a copy of an adapter for every row (rank 16
of a 7B: 160 MB each). What is paid is that every row computes the columns of all adapters, of which
a comparison has few. A row whose gates are zero is the base, and adapters of other ranks, scales
and targets fit beside each other.

Axes: P policies, L layers, R ranks of all adapters together.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from models import decoder, incremental
from models.families import DecoderConfig
from models.lora import TARGETS, LoraConfig

# An adapter's shape, and flat name -> array [L, in, R] or [L, R, out]; None is the base.
Adapter = tuple[LoraConfig, Mapping[str, np.ndarray]] | None


@dataclasses.dataclass(frozen=True)
class SideBySide:
  """A base and several policies over it.

  Attributes:
    model: its adapter is all of them.
    gates: float32 [P, R], of each policy: alpha / rank in its own columns, else 0.
  """

  model: decoder.Model
  gates: np.ndarray


def prepare(model: decoder.Model | SideBySide) -> SideBySide:
  """For the passes of `models.incremental`: one adapter merged, several left as they are.

  What is prepared already is returned as it is, so that several engines can share its arrays. A
  model is one policy, whose gates have no columns.
  """
  if not isinstance(model, SideBySide):
    merged = decoder.merge_lora(model)
    model = SideBySide(merged, np.zeros((1, 0), np.float32))
  prepared = incremental.prepare_for_decode(model.model)
  return model if prepared is model.model else dataclasses.replace(model, model=prepared)


def side_by_side(
  config: DecoderConfig, adapters: Sequence[Adapter]
) -> tuple[LoraConfig, dict[str, np.ndarray], np.ndarray]:
  """Joins adapters to one.

  Args:
    config: the base's architecture.
    adapters: of each policy, at least one of them not the base.

  Returns:
    The joint adapter's shape and parameters, as `decoder.from_params` takes them, and the gates of
    `SideBySide`.
  """
  given = [(i, *adapter) for i, adapter in enumerate(adapters) if adapter is not None]
  width = sum(own.rank for _, own, _ in given)
  targets = {target for _, own, _ in given for target in own.targets}
  # Its scale is 1: each one's own is in the gates.
  joint = LoraConfig(width, float(width), targets=tuple(t for t in TARGETS if t in targets))
  params = {
    name: np.zeros(variable.shape, np.float32)
    for name, variable in decoder.to_params(decoder.abstract(config, joint).lora).items()}
  gates = np.zeros((len(adapters), width), np.float32)
  start = 0
  for i, own, values in given:
    columns = slice(start, start + own.rank)
    gates[i, columns] = own.scale
    for name, value in values.items():
      part = (..., columns) if name.endswith('.lora_a') else (slice(None), columns)
      params[name][part] = value
    start += own.rank
  return joint, params, gates
