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
What the run will cost is printed first. `evaluate=` adds rows (controls, other k, other writers:
experiments/evaluation_rows.py), `next_after=RUN` starts from a finished run's student and bank: the
next round. `--dry_run` walks all stages with a shrunken random model and a few games.
"""

import contextlib
import json
import os
import pathlib
import types
from collections.abc import Sequence
from typing import Any

from absl import flags

import rollout
from agents import expert_episodes
from configs import cli
from configs import rollout as rollout_config
from data import errors, summary, trajectory
from data import workdir as workdir_lib
from experiments import budget, dry_run, evaluation_rows, report, stages, warm_start
from retrieval import hints as hints_lib
from training import dataset

# Adding a row to a finished run plays that row only.
_FREE_KEYS = ('evaluate',)


class Loop(stages.Stages):
  """One run of the method: its config, its folder, and the base weights, loaded once."""

  def __init__(self, config, workdir: pathlib.Path, dry_hint_url: str = ''):
    """Describes the run; nothing is loaded or written yet.

    Args:
      config: as configs/hint_distillation.py makes it.
      workdir: the run's folder.
      dry_hint_url: the hint server of a dry run; '' for a real run.
    """
    super().__init__(config, workdir)
    self.dry_hint_url = dry_hint_url

  # What the stages share.

  def rollout(self, folder: pathlib.Path, *, policy: str, adapter: str, split: str, games: int,
              skip: int = 0, bank: str = '', **changes) -> list[trajectory.Episode]:
    """Plays episodes of the loop's skills, with hints where a bank is given."""
    c = self.config
    return self.play(folder, **{
      **dict(policy=policy, adapter=adapter, split=split, episodes=games, skip=skip,
             memory='hints' if bank else 'none', bank=bank, skills=c.loop_skills, env_seed=c.seed),
      **changes})

  def bank(self, writer: str = '') -> str:
    """The bank's file; `writer` names the stage of another writer than the config's."""
    return str(self.workdir / (f'hints-{writer}' if writer else 'hints') / 'bank.json')

  @property
  def start_adapter(self) -> str:
    """What all policies continue: the warm start, the round before, or nothing."""
    if self.config.next_after:
      return stages.record_of(self.config.next_after, 'distilled')['adapter']
    return str(self.workdir / 'warm_start' / 'adapter') if self.config.warm_episodes else ''

  @property
  def train_skip(self) -> int:
    """Training games that the warm start has shown or the rounds before have played."""
    c = self.config
    if not c.next_after:
      return c.warm_episodes if c.warm_skills == c.loop_skills else 0
    folder = pathlib.Path(c.next_after)
    names = [path.parent.name for path in folder.glob('base*/done.json')]
    return stages.record_of(folder, 'base')['skip'] + sum(
      stages.record_of(folder, name)['episodes'] for name in names)

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
      folder, str(folder), '', drop_memory=False, epochs=c.warm_epochs,
      learning_rate=c.warm_learning_rate, max_examples=0)
    return {**stages.counts(episodes), 'training': trained}

  def collect(self, folder: pathlib.Path, policy: str) -> dict:
    episodes = self.rollout(
      folder, policy=policy, adapter=self.start_adapter, split=self.config.train_split,
      games=self.config.train_games, skip=self.train_skip,
      bank=self.bank() if policy == 'teacher' else '')
    return {**stages.counts(episodes), 'skip': self.train_skip}

  def hints(self, folder: pathlib.Path, writer: str = '') -> dict:
    """Writes a bank through retrieval.hints' own code; no failure gives an empty bank.

    Args:
      folder: of the stage.
      writer: another one than the config's, over the same failures.
    """
    c = self.config
    runs = [str(self.workdir / 'base')]
    if c.next_after:
      # A later round knows what the failures of the earlier ones taught.
      before = json.loads((pathlib.Path(c.next_after) / 'hints' / 'bank.json').read_text())
      runs = [*before['provenance']['runs'], *runs]
    failures = sum(not e.success for run in runs for e in trajectory.load_episodes(run))
    out, chosen = self.bank(writer), writer or c.writer
    if not failures:
      print('No episode failed: the bank is empty and the teacher plays without hints.')
      hints_lib.HintBank([], {'runs': runs, 'failures': 0}).save(out)
      return {'hints': 0, 'failures': 0}
    print(f'{failures} failures, writer {chosen}, '
          + ('under 0.1 min' if chosen == 'rules' else 'one call of a model each'), flush=True)
    bank = hints_lib.main(
      types.SimpleNamespace(
        episodes=','.join(runs), out=out, writer=chosen,
        # The warm start made an actor of the model, which answers everything with an action: as a
        # writer it is asked without.
        model=c.hint_model if chosen == 'openai' else self.model, adapter='',
        slots=c.slots, max_context=c.hint_max_context,
        base_url=self.dry_hint_url or c.hint_base_url, timeout_s=60.0, retries=4),
      load_policy=lambda: (self.playing.model(), self.playing.tokenizer, self.playing.name))
    return {'hints': len(bank.hints), 'failures': failures}

  def usable(self, sources: Sequence[str]) -> int:
    """How many episodes of these stages pass the filter of the training set."""
    episodes = [e for name in sources for e in trajectory.load_episodes(self.workdir / name)]
    kept, _ = dataset.select(episodes, dataset.Rules(max_invalid=self.config.max_invalid))
    return len(kept)

  def more_base_games(self) -> list[str]:
    """Plays base on further training games until it has as many usable episodes as the teacher.

    Returns:
      The stages that hold base's episodes.
    """
    c = self.config
    wanted, sources = self.usable(['teacher']), ['base']
    played = self.train_skip + c.train_games
    while (have := self.usable(sources)) < wanted:
      # At the rate so far, a tenth more; a base that wins nothing gets one further try.
      rate = have / (played - self.train_skip)
      games = max(8, round(1.1 * (wanted - have) / rate)) if have else c.train_games
      name = f'base_more_{len(sources)}'
      self.stage(name, lambda folder, g=games, p=played: stages.counts(self.rollout(
        folder, policy='base', adapter=self.start_adapter, split=c.train_split, games=g, skip=p)))
      sources.append(name)
      played += games
      if not have:
        break
    return sources

  def student(self, folder: pathlib.Path, sources: Sequence[str], max_examples: int = 0) -> dict:
    """Trains on the successes of stages; without any, the student is what it would have continued.

    Args:
      folder: of the stage.
      sources: the stages.
      max_examples: a random subset of that size; 0 is all.
    """
    # A random model solves nothing; its dry run trains on what there is.
    untrained = dict(success_only=False, max_invalid=10**6) if self.dry_hint_url else {}
    if not self.usable(sources) and not untrained:
      print(f'No episode of {", ".join(sources)} passes the filter: nothing to train on.')
      return {'trained': 0, 'adapter': self.start_adapter}
    trained = self.train(
      folder, ','.join(str(self.workdir / name) for name in sources), self.start_adapter,
      drop_memory=True, drop_few_shot=True, max_examples=max_examples, **untrained)
    return {'trained': trained['episodes']['kept'], 'adapter': str(folder / 'adapter'),
            'training': trained}

  def evaluate(self, folder: pathlib.Path, row: evaluation_rows.Row) -> dict:
    c = self.config
    adapter = self.start_adapter
    if row.policy != 'base':
      adapter = stages.record_of(self.workdir, row.policy)['adapter']
    episodes = self.rollout(
      folder, policy=row.policy, adapter=adapter, split=c.eval_split, games=c.eval_games,
      bank=self.bank(row.writer) if row.memory == 'hints' else '',
      retrieval=row.retrieval or c.retrieval, k=row.k or c.k)
    return stages.counts(episodes)

  def run(self) -> dict[str, Any]:
    """All stages; returns and writes summary.json."""
    c = self.config
    rows = evaluation_rows.parse(c.evaluate)
    stages.check_splits(c, c.loop_skills)
    workdir_lib.open_workdir(
      self.workdir, {**c.to_dict(), 'dry_run': bool(self.dry_hint_url)}, free_keys=_FREE_KEYS)
    self.train_decoder()
    predicted = stages.predicted(
      self.workdir, {'evaluate': c.evaluate}, lambda: budget.predict(c, self.base, rows))
    print(budget.table(predicted), flush=True)
    if c.warm_episodes:
      self.stage('warm_start', self.warm_start)
    self.stage('base', lambda folder: self.collect(folder, 'base'))
    self.stage('hints', self.hints)
    self.stage('teacher', lambda folder: self.collect(folder, 'teacher'))
    students = {row.policy for row in rows}
    if 'sft' in students:
      sources, same = ['base'], 0
      if c.sft_examples == 'matched' and not self.dry_hint_url:
        sources, same = self.more_base_games(), self.usable(['teacher'])
      self.stage('sft', lambda folder: self.student(folder, sources, same))
    if 'distilled' in students:
      self.stage('distilled', lambda folder: self.student(folder, ['teacher']))
    for writer in sorted({row.writer for row in rows} - {''}):
      self.stage(f'hints-{writer}', lambda folder, w=writer: self.hints(folder, w))
    records, played = [], {}
    for row in rows:
      name = f'evaluation/{row.id}'
      self.stage(name, lambda folder, r=row: self.evaluate(folder, r))
      played[row.id] = trajectory.load_episodes(self.workdir / name)
      records.append(summary.row(
        played[row.id], id=row.id, policy=row.policy, memory=row.memory, split=c.eval_split,
        seed=c.seed))
    record = {
      'rows': records,
      'paired': [summary.paired(played[a], played[b], a_id=a, b_id=b)
                 for a, b in evaluation_rows.pairs(rows)],
      'won': summary.outcomes(played), 'wall_s': self.wall_s, 'predicted': predicted,
      'stages': {name: {key: value for key, value in stage.items() if isinstance(value, int)}
                 for name, stage in self.records.items()},
      'config': c.to_dict(), 'versions': summary.versions()}
    workdir_lib.write_json(self.workdir / 'summary.json', record)
    return record


def check(config) -> None:
  """What can be known to be wrong before anything slow starts.

  Raises:
    errors.UserError: no games asked for, the data folder or the writer's model is missing.
  """
  if config.train_games < 1 or config.eval_games < 1:
    raise errors.UserError('train_games and eval_games must be at least 1.')
  if config.sft_examples not in ('own', 'matched'):
    raise errors.UserError(f'sft_examples is own or matched, not {config.sft_examples!r}.')
  evaluation_rows.parse(config.evaluate)
  if config.next_after:
    for stage in ('base', 'hints', 'distilled'):
      if not (pathlib.Path(config.next_after) / stage / 'done.json').is_file():
        raise errors.UserError(
          f'next_after={config.next_after} is no run whose stage {stage} is finished; give the '
          '--workdir of a finished run.')
    if config.warm_episodes:
      raise errors.UserError('next_after goes on from a student: set warm_episodes=0.')
  stages.check_dtypes(config)
  stages.check_data(config.data)
  stages.check_decoder(config)
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
    if flags.FLAGS.dry_run:
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
  print('tokens an episode, hint block not counted: '
        + ', '.join(f'{name} {mean:.0f}' for name, mean in tokens.items()))
  print(f'\n{sum(record["wall_s"].values()) / 60:.1f} min in all; {workdir / "summary.json"}')
  for page in report.write(workdir):
    print(f'to look at: {page}')


if __name__ == '__main__':
  cli.define_config_flags()
  flags.DEFINE_bool('dry_run', False, 'Walk all stages with a tiny random model.')
  cli.run(main)
