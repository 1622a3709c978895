"""The TFDS builder: features of an episode in RLDS form (episodes/steps), ArrayRecord files.

RLDS (Ramos et al. 2021): a data set of episodes, each with a nested data set of steps; a step holds
the observation, the action taken on it, and the reward that the action brought; the last step holds
the final observation alone. So n model calls make n + 1 steps, the first of them observing the
instruction.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from data import schema

_SCALARS = {int: np.int64, bool: np.bool_}


def _feature(kind: type) -> tfds.features.FeatureConnector:
  """The feature that gives one of Python's own scalars back exactly."""
  if kind is str:
    return tfds.features.Text()
  if kind is float:
    # The underlying tf.train.Example knows only float32 numbers; bytes keep a double whole.
    return tfds.features.Tensor(shape=(), dtype=np.float64, encoding=tfds.features.Encoding.BYTES)
  return tfds.features.Scalar(_SCALARS[kind])


STEP_FIELDS = {f.name: f.type for f in dataclasses.fields(schema.Step) if f.name != 'observation'}
EPISODE_FIELDS = {
  f.name: f.type
  for f in dataclasses.fields(schema.Episode)
  if f.name not in ('tokens', 'kinds', 'logprobs', 'steps', 'retrieved')
}

# What `Episode.retrieved` says of an experience and not of a hint, with what stands for nothing.
_OF_EXPERIENCES = {'outcome': '', 'provenance': '', 'step': 0}


def features() -> tfds.features.FeaturesDict:
  """The feature tree of one episode."""
  step = {name: _feature(kind) for name, kind in STEP_FIELDS.items()}
  step |= {name: _feature(bool) for name in ('is_first', 'is_last', 'is_terminal')}
  step |= {'observation': _feature(str), 'discount': _feature(float)}
  return tfds.features.FeaturesDict(
    {name: _feature(kind) for name, kind in EPISODE_FIELDS.items()}
    | {
      'tokens': tfds.features.Tensor(shape=(None,), dtype=np.int32),
      'kinds': tfds.features.Tensor(shape=(None,), dtype=np.uint8),
      'logprobs': tfds.features.Tensor(shape=(None,), dtype=np.float32),
      'retrieved': tfds.features.Sequence(
        {
          'id': _feature(str),
          'score': _feature(float),
          'text': _feature(str),
          # Of experiences; '' and 0 for hints.
          'outcome': _feature(str),
          'provenance': _feature(str),
          'step': _feature(int),
        }
      ),
      'steps': tfds.features.Dataset(step),
    }
  )


def to_example(episode: schema.Episode) -> dict[str, Any]:
  """One episode as the example that `features` describes."""
  # An episode that ran into a limit is truncated, not terminated.
  terminal = episode.termination in ('success', 'failure')
  observations = [episode.instruction] + [step.observation for step in episode.steps]
  last = len(episode.steps)
  steps = []
  for index, step in enumerate([*episode.steps, schema.Step(reply='', stop_reason='')]):
    steps.append(
      {name: kind(getattr(step, name)) for name, kind in STEP_FIELDS.items()}
      | {
        'observation': observations[index],
        'discount': 0.0 if terminal and index >= last - 1 else 1.0,
        'is_first': index == 0,
        'is_last': index == last,
        'is_terminal': terminal and index == last,
      }
    )
  example = {name: kind(getattr(episode, name)) for name, kind in EPISODE_FIELDS.items()}
  arrays = {name: getattr(episode, name) for name in ('tokens', 'kinds', 'logprobs')}
  retrieved = [
    {**found, **{name: found.get(name, default) for name, default in _OF_EXPERIENCES.items()}}
    for found in episode.retrieved
  ]
  return example | arrays | {'retrieved': retrieved, 'steps': steps}


def from_example(example: dict[str, Any]) -> schema.Episode:
  """The episode of one example as `as_data_source` yields it."""

  def plain(value, kind):
    return value.decode('utf-8') if kind is str else kind(value)

  rows = list(example['steps'])
  steps = [
    schema.Step(
      observation=following['observation'].decode('utf-8'),
      **{name: plain(row[name], kind) for name, kind in STEP_FIELDS.items()},
    )
    for row, following in itertools.pairwise(rows)
  ]
  found = example['retrieved']
  retrieved = [
    {'id': plain(i, str), 'score': float(score), 'text': plain(text, str)}
    for i, score, text in zip(found['id'], found['score'], found['text'])
  ]
  # Stores written before there were experiences lack their fields.
  for i, outcome in enumerate(found.get('outcome', ())):
    if outcome:
      retrieved[i] |= {
        name: plain(found[name][i], type(default)) for name, default in _OF_EXPERIENCES.items()
      }
  return schema.Episode(
    steps=steps,
    retrieved=retrieved,
    **{name: example[name] for name in ('tokens', 'kinds', 'logprobs')},
    **{
      name: plain(example[name], kind)
      for name, kind in EPISODE_FIELDS.items()
      if name in example
    },
  )


class Episodes(tfds.core.GeneratorBasedBuilder):
  """Episodes of one run, one split 'train', in the order given."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Token-in, token-out episodes.'}

  def __init__(self, *, episodes: Iterable[schema.Episode], **kwargs):
    self._episodes = episodes
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      features=features(),
      disable_shuffling=True,
      description='Episodes of a language model agent, with every token that it saw and sampled.',
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for index, episode in enumerate(self._episodes):
      yield index, to_example(episode)
