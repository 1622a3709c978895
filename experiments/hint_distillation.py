"""Hint distillation from end to end (arXiv 2510.01375), every stage resumable.

  python -m experiments.hint_distillation \
    --config=configs/hint_distillation.py:model=smollm2_135m --workdir=runs/demo

  warm_start   expert episodes of other skills -> an adapter that acts and reads hints
  base         episodes without hints on training houses: failures, and the SFT set
  hints        failures -> hint bank
  teacher      episodes with the k best hints: its successes are the distillation set
  sft          student on base's successes
  distilled    student on the teacher's successes with hints and few-shots removed
  evaluation   base, base+hints, sft, distilled on houses that no stage saw, paired, greedy

Each stage has a folder in the workdir and is skipped when it is finished; a stopped stage goes on.
`--dry_run` walks all of it with a shrunken random model and a few games.
"""

import contextlib
import json
import os
import pathlib
import time
import types
from collections.abc import Callable
from typing import Any

from absl import flags

import rollout
import train
from agents import expert_episodes
from agents import policy as policy_lib
from configs import cli
from configs import rollout as rollout_config
from configs import train as train_config
from data import errors, summary, trajectory
from data import workdir as workdir_lib
from experiments import dry_run, report, warm_start
from retrieval import hints as hints_lib
from training import dataset

_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Walk all stages with a tiny random model.')


class Loop:
  """One run of the method: its config, its folder, and the base weights, loaded once."""

  def __init__(self, config, workdir: pathlib.Path, dry_hint_url: str = ''):
    """Describes the run; nothing is loaded or written yet.

    Args:
      config: as configs/hint_distillation.py makes it.
      workdir: the run's folder.
      dry_hint_url: the hint server of a dry run; '' for a real run.
    """
    self.config = config
    self.workdir = workdir
    self.dry_hint_url = dry_hint_url
    self.wall_s: dict[str, float] = {}
    self._base = None

  @property
  def base(self) -> policy_lib.Base:
    if self._base is None:
      c = self.config
      self._base = policy_lib.load_base(
        c.model, c.base, tokenizer=c.tokenizer, shrink=c.shrink, dtype=c.dtype, seed=c.seed)
    return self._base

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
    return record

  # What the stages share.

  def rollout(self, folder: pathlib.Path, *, policy: str, adapter: str, memory: str, split: str,
              games: int) -> list[trajectory.Episode]:
    """Plays episodes through rollout.py's own code; the same as its command with this config."""
    c = self.config
    values = {key: c[key] for key in rollout_config.DEFAULTS if key in c}
    values.update(
      policy=policy, adapter=adapter, split=split, episodes=games, memory=memory,
      skills=c.loop_skills, env_seed=c.seed, bank=str(self.bank) if memory == 'hints' else '')
    rollout.run(rollout_config.make(values), folder, base=self.base)
    return trajectory.load_episodes(folder)

  def train(self, folder: pathlib.Path, data: pathlib.Path, init_adapter: str, **changes) -> dict:
    """Fine-tunes through train.py's own code."""
    c = self.config
    values = {key: c[key] for key in train_config.DEFAULTS if key in c}
    values.update(data=str(data), init_adapter=init_adapter)
    values.update(changes)
    return train.run(train_config.make(values), folder, base=self.base)

  @property
  def bank(self) -> pathlib.Path:
    return self.workdir / 'hints' / 'bank.json'

  @property
  def start_adapter(self) -> str:
    """What all policies continue: the warm start's adapter, or nothing."""
    return str(self.workdir / 'warm_start' / 'adapter') if self.config.warm_episodes else ''

  # The stages.

  def warm_start(self, folder: pathlib.Path) -> dict:
    c = self.config
    values = {key: c[key] for key in rollout_config.DEFAULTS if key in c}
    values.update(skills=c.warm_skills, env_seed=c.seed, episodes=c.warm_episodes)
    config = rollout_config.make(values)
    suite = rollout.make_suite(config)
    tasks = rollout.choose_tasks(suite, 'train', c.warm_episodes)
    spec = expert_episodes.expert_spec(rollout.make_spec(config))
    episodes = warm_start.play(
      suite, tasks, self.base.tokenizer, spec, folder, k=c.k, hint_share=c.warm_hint_share,
      rule_share=c.warm_rule_share, seed=c.seed)
    trained = self.train(
      folder, folder, '', drop_memory=False, epochs=c.warm_epochs,
      learning_rate=c.warm_learning_rate, max_examples=0)
    return {'episodes': len(episodes), 'won': sum(e.success for e in episodes),
            'tokens': sum(len(e.tokens) for e in episodes), 'training': trained}

  def collect(self, folder: pathlib.Path, memory: str) -> dict:
    policy = 'teacher' if memory == 'hints' else 'base'
    episodes = self.rollout(
      folder, policy=policy, adapter=self.start_adapter, memory=memory,
      split=self.config.train_split, games=self.config.train_games)
    return {'episodes': len(episodes), 'won': sum(e.success for e in episodes),
            'tokens': sum(len(e.tokens) for e in episodes)}

  def hints(self, folder: pathlib.Path) -> dict:
    """Writes the bank through retrieval.hints' own code; no failure gives an empty bank."""
    c = self.config
    source = self.workdir / 'base'
    failures = sum(not e.success for e in trajectory.load_episodes(source))
    if not failures:
      print('No episode failed: the bank is empty and the teacher plays without hints.')
      hints_lib.HintBank([], {'runs': [str(source)], 'failures': 0}).save(self.bank)
      return {'hints': 0, 'failures': 0}
    print(f'{failures} failures, writer {c.writer}, '
          + ('under 0.1 min' if c.writer == 'rules' else 'one call of a model each'), flush=True)
    bank = hints_lib.main(
      types.SimpleNamespace(
        episodes=str(source), out=str(self.bank), writer=c.writer,
        model=c.hint_model if c.writer == 'openai' else c.model, adapter=self.start_adapter,
        slots=c.slots, max_context=c.max_context,
        base_url=self.dry_hint_url or c.hint_base_url, timeout_s=60.0, retries=4),
      load_policy=lambda: (self.base.model(self.start_adapter), self.base.tokenizer,
                           self.base.name))
    return {'hints': len(bank.hints), 'failures': failures}

  def student(self, folder: pathlib.Path, source: str) -> dict:
    """Trains on a stage's successes; without any, the student is what it would have continued."""
    # A random model solves nothing; its dry run trains on what there is.
    untrained = dict(success_only=False, max_invalid=10**6) if self.dry_hint_url else {}
    rules = dataset.Rules(max_invalid=self.config.max_invalid)
    kept, counts = dataset.select(trajectory.load_episodes(self.workdir / source), rules)
    if not kept and not untrained:
      print(f'No episode of {source} passes the filter ({counts}): nothing to train on.')
      return {'trained': 0, 'adapter': self.start_adapter}
    trained = self.train(
      folder, self.workdir / source, self.start_adapter, drop_memory=True, drop_few_shot=True,
      **untrained)
    return {'trained': trained['episodes']['kept'], 'adapter': str(folder / 'adapter'),
            'training': trained}

  def evaluate(self, folder: pathlib.Path, policy: str, memory: str) -> dict:
    adapter = self.start_adapter
    if policy != 'base':
      adapter = json.loads((self.workdir / policy / 'done.json').read_text())['adapter']
    episodes = self.rollout(
      folder, policy=policy, adapter=adapter, memory=memory, split=self.config.eval_split,
      games=self.config.eval_games)
    return {'tokens': sum(len(e.tokens) for e in episodes)}

  def run(self) -> dict[str, Any]:
    """All stages; returns and writes summary.json."""
    c = self.config
    workdir_lib.open_workdir(self.workdir, {**c.to_dict(), 'dry_run': bool(self.dry_hint_url)})
    if c.warm_episodes:
      self.stage('warm_start', self.warm_start)
    self.stage('base', lambda folder: self.collect(folder, 'none'))
    self.stage('hints', self.hints)
    self.stage('teacher', lambda folder: self.collect(folder, 'hints'))
    self.stage('sft', lambda folder: self.student(folder, 'base'))
    self.stage('distilled', lambda folder: self.student(folder, 'teacher'))
    rows, played = [], {}
    for row_id, policy, memory in (
        ('base', 'base', 'none'), ('base+hints', 'base', 'hints'), ('sft', 'sft', 'none'),
        ('distilled', 'distilled', 'none')):
      name = f'evaluation/{row_id}'
      self.stage(name, lambda folder, p=policy, m=memory: self.evaluate(folder, p, m))
      played[row_id] = trajectory.load_episodes(self.workdir / name)
      rows.append(summary.row(
        played[row_id], id=row_id, policy=policy, memory=memory, split=c.eval_split, seed=c.seed))
    pairs = [
      summary.paired(played[a], played[b], a_id=a, b_id=b)
      for a, b in (('base+hints', 'base'), ('sft', 'base'), ('distilled', 'base'),
                   ('distilled', 'sft'), ('distilled', 'base+hints'))]
    record = {'rows': rows, 'paired': pairs, 'wall_s': self.wall_s, 'config': c.to_dict(),
              'versions': summary.versions()}
    workdir_lib.write_json(self.workdir / 'summary.json', record)
    return record


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


def check(config) -> None:
  """What can be known to be wrong before anything slow starts.

  Raises:
    errors.UserError: no games asked for, the data folder or the writer's model is missing.
  """
  if config.train_games < 1 or config.eval_games < 1:
    raise errors.UserError('train_games and eval_games must be at least 1.')
  if '$' in config.data:
    raise errors.UserError(
      f'data is {config.data}, and that variable is not set; set it to the folder of the real '
      'data, or give data=FOLDER or data=generated.')
  hints_lib.check_flags(config.writer, config.hint_model)
  if config.writer == 'openai' and 'api.openai.com' in config.hint_base_url and not os.environ.get(
      'OPENAI_API_KEY'):
    raise errors.UserError(
      'writer=openai needs the environment variable OPENAI_API_KEY (or hint_base_url of a server '
      'that wants no key).')


def main(_):
  config = flags.FLAGS.config
  config.data = os.path.expandvars(config.data)
  workdir = pathlib.Path(flags.FLAGS.workdir)
  with contextlib.ExitStack() as stack:
    hint_url = ''
    if _DRY_RUN.value:
      config = dry_run.shrink(config)
      hint_url = stack.enter_context(dry_run.hint_server())
    else:
      check(config)
    record = Loop(config, workdir, hint_url).run()
  print()
  print(summary.table(record['rows'], record['paired']))
  tokens = {
    row['id']: row['prompt_tokens_mean'] - row['memory_tokens_mean'] + row['generated_tokens_mean']
    for row in record['rows']}
  print(f'tokens an episode, hint block not counted: distilled {tokens["distilled"]:.0f}, '
        f'teacher (base+hints) {tokens["base+hints"]:.0f}')
  print(f'\n{sum(record["wall_s"].values()) / 60:.1f} min in all; {workdir / "summary.json"}')
  print(f'to look at: {report.write(workdir)}')


if __name__ == '__main__':
  cli.define_config_flags()
  cli.run(main)
