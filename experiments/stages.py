"""Stages of an experiment: each has a folder, is skipped when finished, and goes on if not."""

import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import rollout
import train
from agents import policy as policy_lib
from configs import common
from configs import from_scratch as scratch_config
from configs import rollout as rollout_config
from configs import train as train_config
from data import errors, trajectory
from data import workdir as workdir_lib
from experiments import from_scratch


class Stages:
  """A run of several stages: its config, its folder, and the base weights, loaded once.

  Attributes:
    config: flat; the keys that it shares with configs/rollout.py and configs/train.py are theirs.
    workdir: the run's folder.
    wall_s: stage -> seconds over all its starts.
    records: stage -> what it recorded.
  """

  def __init__(self, config: Any, workdir: pathlib.Path):
    from training import speed

    # Settled once, so that all stages that train multiply alike, and all that play.
    self.config = config.copy_and_resolve_references()
    self.config.dtype = speed.settle_dtype(config.dtype, workdir)
    if not config.play_dtype:
      # What the stage `decoder` makes is not there to be asked about.
      self.config.play_dtype = self.config.dtype if config.decoder else policy_lib.settle_dtype(
        _alone(config), None, workdir, key='play_dtype')
    self.workdir = workdir
    self.wall_s: dict[str, float] = {}
    self.records: dict[str, dict[str, Any]] = {}
    self._bases: dict[str, policy_lib.Base] = {}

  @property
  def model(self) -> str:
    """The model by name or path: the config's, or that of the stage `decoder`."""
    if self.config.decoder:
      return str(self.workdir / 'decoder' / from_scratch.MODEL_FOLDER)
    return self.config.model

  def train_decoder(self) -> None:
    """The stage that makes the model, where the config's key `decoder` asks for one."""
    if self.config.decoder:
      config = scratch_config.of_experiment(self.config)
      self.stage('decoder', lambda folder: {'training': from_scratch.run(config, folder)})

  @property
  def base(self) -> policy_lib.Base:
    """The base weights as they are trained with."""
    return self._base_in(self.config.dtype)

  @property
  def playing(self) -> policy_lib.Base:
    """The base weights as they play; the same object where the dtype is."""
    return self._base_in(self.config.play_dtype)

  def _base_in(self, dtype: str) -> policy_lib.Base:
    if dtype not in self._bases:
      c = self.config
      self._bases[dtype] = policy_lib.load_base(
        self.model, c.base, tokenizer=c.tokenizer, shrink=c.shrink, dtype=dtype,
        base_quantization=c.base_quantization, seed=c.seed)
    return self._bases[dtype]

  def stage(self, name: str, body: Callable[[pathlib.Path], dict[str, Any] | None]) -> dict:
    """Runs `body(folder)` unless the folder says that it is finished; returns what it recorded."""
    folder = self.workdir / name
    done = folder / 'done.json'
    if done.exists():
      record = json.loads(done.read_text())
      print(f'[{name}] finished before ({record["wall_s"]:.0f} s)', flush=True)
    else:
      print(f'[{name}]', flush=True)
      earlier = _earlier_seconds(folder)
      started = time.perf_counter()
      record = body(folder) or {}
      record['wall_s'] = earlier + time.perf_counter() - started
      workdir_lib.write_json(done, record)
    self.wall_s[name] = record['wall_s']
    self.records[name] = record
    return record

  def play(self, folder: pathlib.Path, **changes) -> list[trajectory.Episode]:
    """Plays episodes through rollout.py's own code: this config's keys, then the changes."""
    values = {key: self.config[key] for key in rollout_config.DEFAULTS if key in self.config}
    # An experiment's mesh is that of its trainings; it plays on one device.
    values.update(model=self.model, mesh='', dtype=self.config.play_dtype, **changes)
    rollout.run(rollout_config.make(values), folder, base=self.playing)
    return trajectory.load_episodes(folder)

  def train(
    self, folder: pathlib.Path, data: str, init_adapter: str,
    score: Callable[[Any], float] | None = None, **changes,
  ) -> dict:
    """Fine-tunes through train.py's own code: this config's keys, then the changes.

    Args:
      folder: of the run.
      data, init_adapter: as in configs/train.py.
      score: of checkpoints, as `train.fit` takes it.
      **changes: further keys of configs/train.py.
    """
    config = self.train_config(data=data, init_adapter=init_adapter, **changes)
    return train.run(config, folder, base=self.base, score=score)

  def train_config(self, **changes):
    """This config's keys of configs/train.py, then the changes."""
    values = {key: self.config[key] for key in train_config.DEFAULTS if key in self.config}
    return train_config.make({**values, 'model': self.model, **changes})


def counts(episodes: Sequence[trajectory.Episode]) -> dict[str, int]:
  """What a stage that played records."""
  return {'episodes': len(episodes), 'won': sum(e.success for e in episodes),
          'tokens': sum(len(e.tokens) for e in episodes)}


def record_of(run: str | pathlib.Path, stage: str) -> dict[str, Any]:
  """What a finished stage recorded."""
  return json.loads((pathlib.Path(run) / stage / 'done.json').read_text())


def check_dtypes(config: Any) -> None:
  """Raises errors.UserError where a dtype is none."""
  common.check_dtype(config.dtype)
  if config.play_dtype not in ('', 'bfloat16', 'float32'):
    raise errors.UserError(
      f"play_dtype={config.play_dtype!r} is not bfloat16 or float32; leave it out for dtype's.")


def check_decoder(config: Any) -> None:
  """Raises errors.UserError where the decoder that the config asks for cannot be made."""
  if config.decoder:
    from_scratch.check(scratch_config.of_experiment(config))


def check_data(data: str) -> None:
  """Raises errors.UserError where the data's folder is a variable that is not set."""
  if '$' in data:
    raise errors.UserError(
      f'data is {data}, and that variable is not set; set it to the folder of the real data, or '
      'give data=FOLDER or data=generated.')


def check_splits(config: Any, skills: str) -> None:
  """Raises errors.UserError where the environment lacks a split that a late stage plays."""
  values = {key: config[key] for key in rollout_config.DEFAULTS if key in config}
  suite = rollout.make_suite(rollout_config.make({**values, 'skills': skills, 'episodes': 1}))
  for key in ('train_split', 'eval_split', 'validation_split'):
    if config.get(key):
      rollout.check_split(suite, config[key])


def _alone(config: Any) -> Any:
  """The config for one device."""
  config = config.copy_and_resolve_references()
  config.mesh = ''
  return config


def predicted(
  workdir: pathlib.Path, free: dict[str, Any], predict: Callable[[], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
  """What the run costs, as predicted before its first start, and anew where `free` changed.

  Args:
    workdir: the run's folder; keeps the prediction in budget.json.
    free: config keys that may change when the run goes on and change the cost.
    predict: gives the parts.
  """
  path = workdir / 'budget.json'
  if path.exists():
    record = json.loads(path.read_text())
    if all(record.get(key) == value for key, value in free.items()):
      return record['parts']
  parts = predict()
  workdir_lib.write_json(path, {**free, 'parts': parts})
  return parts


def _earlier_seconds(folder: pathlib.Path) -> float:
  """Seconds of the starts of a stage that were stopped, and notes that another one begins.

  A killed process cannot say when it ended: it is taken to have lived until the last write to its
  folder.
  """
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / 'starts.json'
  record = json.loads(path.read_text()) if path.exists() else {'earlier_s': 0.0, 'started': None}
  if record['started'] is not None:
    last = max(file.stat().st_mtime for file in folder.rglob('*') if file.is_file())
    record['earlier_s'] += max(0.0, last - record['started'])
  workdir_lib.write_json(path, {'earlier_s': record['earlier_s'], 'started': time.time()})
  return record['earlier_s']
