"""Experience retrieval from end to end (arXiv 2603.18272), every stage resumable.

  python -m experiments.experience_retrieval \
    --config=configs/experience_retrieval.py:model=smollm2_135m --workdir=runs/experience

  index/SPLIT         the scripted expert on training tasks, easy and hard: a bank of experiences
  demonstrations      the same expert on the easy ones, the memory of each task in its context
  lora, exprag_lora, exprag_lora_dropout
                      adapters trained on them: without the memory, with it, with retrieval dropout
  teacher, distilled  an agent with the index plays training tasks; a student learns what it solved,
                      the memory removed
  evaluation          every row on tasks that no stage saw, paired, greedy

Each stage has a folder in the workdir and is skipped when it is finished; a stopped stage goes on.
What the run will cost is printed first; only what the rows need is trained. `--dry_run` walks all
stages with a shrunken random model and a few games.
"""

import hashlib
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

import rollout
import train
from agents import experience_memory, expert_episodes
from agents import memory as memory_lib
from configs import cli
from configs import rollout as rollout_config
from data import errors, summary, trajectory
from data import workdir as workdir_lib
from experiments import budget, demonstrations, dry_run, experience_rows, report, stages
from models import decoder, weights
from retrieval import experience as experience_lib
from training import dataset, packing

# Adding a row to a finished run plays that row only.
_FREE_KEYS = ('evaluate',)
_POLICY_DATA = {
  'lora': 'demonstrations', 'exprag_lora': 'demonstrations',
  'exprag_lora_dropout': 'demonstrations_dropout', 'distilled': 'teacher'}


class Experiment(stages.Stages):
  """One run of the method."""

  def __init__(self, config, workdir: pathlib.Path, *, dry: bool = False):
    """Describes the run; nothing is loaded or written yet.

    Args:
      config: as configs/experience_retrieval.py makes it.
      workdir: the run's folder.
      dry: of a random model, which solves nothing: it is trained on what there is.
    """
    super().__init__(config, workdir)
    self.dry = dry
    self.rows = experience_rows.parse(config.evaluate)
    self._encoder = None

  # What the stages share.

  def tasks_of(self, kind: str) -> dict[str, Any]:
    """The keys of configs/rollout.py that choose a kind of tasks: easy, hard or validation."""
    c = self.config
    if kind == 'validation':
      return dict(skills=c.validation_skills, task_types=c.easy_types, env_seed=c.seed)
    return dict(
      skills=c[f'{kind}_skills'], task_types=c[f'{kind}_types'], env_seed=c.seed)

  def bank_folder(self, name: str) -> pathlib.Path:
    return self.workdir / 'index' / name / 'bank'

  def memory_keys(self, bank: str, condition: str = 'matched') -> dict[str, Any]:
    """The keys of configs/rollout.py for a memory of one bank; '' and not growing is none."""
    c = self.config
    if not bank and condition != 'growing':
      return dict(memory='none', experiences='', bank='', grow=0)
    return dict(
      memory='hints+experience' if c.hint_bank else 'experience', bank=c.hint_bank,
      experiences=str(self.bank_folder(bank)) if bank else '',
      experience_retrieval='random' if condition == 'random' else c.experience_retrieval,
      grow=c.grow if condition == 'growing' else 0)

  def adapter(self, policy: str) -> str:
    """The adapter of a policy; '' is the model as it is."""
    if policy == 'frozen':
      return self.config.start_adapter
    return stages.record_of(self.workdir, policy)['adapter']

  @property
  def needed(self) -> list[str]:
    """Policies that have to be trained for the rows, in the order of their training."""
    wanted = {row.policy for row in self.rows}
    if 'distilled' in wanted:
      wanted.add(self.config.teacher)
    return [policy for policy in _POLICY_DATA if policy in wanted]

  @property
  def kinds(self) -> list[str]:
    """Kinds of tasks that have an index."""
    validates = self.config.validation_skills and self.config.candidates > 1
    return [*experience_rows.SPLITS, *(['validation'] if validates and self.needed else [])]

  # The stages.

  def index(self, folder: pathlib.Path, kind: str) -> dict:
    """The expert's episodes on training tasks of a kind, as a bank with its index."""
    c = self.config
    chosen = {**self.tasks_of(kind), **self.memory_keys(''), 'split': c.train_split,
              'agent': 'expert', 'expert_format': c.agent, 'expert_knows_rules': True,
              'max_calls': 0}
    played = self.play(folder / 'expert', episodes=c.index_games, **chosen)
    runs = [(folder / 'expert', played)]
    if errs := round(c.failures * len(played)):
      runs.append((folder / 'erring', self.play(
        folder / 'erring', episodes=errs, expert_error_rate=c.error_rate,
        max_env_steps=c.failure_steps, **chosen)))
    bank = experience_lib.ExperienceBank()
    for run, episodes in runs:
      # The erring expert is asked for failures.
      kept = [e for e in episodes if e.success == (run.name == 'expert')]
      bank.add_episodes(kept, self.base.tokenizer, str(run.relative_to(self.workdir)))
    if not len(bank):
      raise errors.UserError(
        f'The index of {kind} tasks is empty: the expert solved none of {len(played)} games in '
        f'{c.max_env_steps} steps; raise max_env_steps.')
    bank.save(folder / 'bank')
    return {**stages.counts(played), 'experiences': len(bank), **self._report(folder / 'bank')}

  def index_all(self, folder: pathlib.Path) -> dict:
    """Both splits' experiences in one bank."""
    bank = experience_lib.ExperienceBank()
    for split in experience_rows.SPLITS:
      part = experience_lib.ExperienceBank.load(self.bank_folder(split))
      bank.provenance = {**part.provenance, 'sources': [
        *bank.provenance['sources'], *part.provenance['sources']]}
      bank.experiences += part.experiences
    bank.save(folder / 'bank')
    return {'experiences': len(bank), **self._report(folder / 'bank')}

  def _report(self, folder: pathlib.Path) -> dict:
    """Builds and keeps the index of a bank; how well it finds."""
    found = self._load(folder).report
    return {'index': {'kind': found.kind, 'recall': found.recall, 'recall_k': found.recall_k}}

  def _load(self, folder: pathlib.Path):
    c = self.config
    return experience_memory.load(
      folder, c.experience_retrieval, 'static', exact_below=c.exact_below,
      leaves_searched=c.leaves_searched)

  def demonstrate(self, folder: pathlib.Path, *, dropout: float, draws: int) -> dict:
    """Expert episodes on the easy training tasks, each with its memory in the context."""
    c = self.config
    values = {key: c[key] for key in rollout_config.DEFAULTS if key in c}
    values.update(
      self.tasks_of('easy'), agent='expert', expert_format=c.agent, episodes=c.index_games)
    config = rollout_config.make(values)
    suite = rollout.make_suite(config)
    tasks = rollout.choose_tasks(suite, c.train_split, c.index_games)
    spec = expert_episodes.expert_spec(rollout.make_spec(config))
    hints = {}
    if c.hint_bank:
      index = memory_lib.load_index(c.hint_bank, c.retrieval, folder / 'hint_vectors.npz')
      hints = memory_lib.retrieve_hints(
        index, suite, tasks, c.k, method=c.retrieval, seed=c.seed)
    memory = experience_memory.ExperienceMemory(
      self._load(self.bank_folder('easy')), experience_memory.rules_of(c), self.base.tokenizer,
      hints)
    episodes = []
    for draw in range(draws):
      episodes += demonstrations.play(
        suite, tasks, self.base.tokenizer, spec, memory, folder / f'draw{draw}', draw=draw,
        dropout=dropout, mismatched=c.dropout_mismatched, knows=c.expert_knows, seed=c.seed)
    blocks = [int((e.kinds == trajectory.KIND['memory']).sum()) for e in episodes]
    return {**stages.counts(episodes), 'draws': draws, 'memory_tokens_mean': float(np.mean(blocks)),
            'without_memory': sum(not n for n in blocks)}

  def collect(self, folder: pathlib.Path) -> dict:
    """The teacher, with the index of each split, on that split's training tasks."""
    c = self.config
    episodes = []
    for split in self.teacher_splits:
      episodes += self.play(
        folder / split, policy='teacher', adapter=self.adapter(c.teacher), split=c.train_split,
        episodes=c.teacher_games, **self.tasks_of(split), **self.memory_keys(split))
    return stages.counts(episodes)

  @property
  def teacher_splits(self) -> list[str]:
    return [part.strip() for part in self.config.teacher_splits.split(',') if part.strip()]

  def student(self, folder: pathlib.Path, policy: str) -> dict:
    """Trains a policy, and where checkpoints were kept chooses the best by rollouts."""
    c = self.config
    source, draws = _POLICY_DATA[policy], 1
    if policy == 'distilled':
      data = [self.workdir / source / split for split in self.teacher_splits]
    else:
      draws = stages.record_of(self.workdir, source)['draws']
      data = [self.workdir / source / f'draw{draw}' for draw in range(draws)]
    # A random model solves nothing; its dry run trains on what there is.
    untrained = dict(success_only=False, max_invalid=10**6) if self.dry else {}
    rules = dataset.Rules(max_invalid=c.max_invalid)
    episodes = [e for run in data for e in trajectory.load_episodes(run)]
    if not untrained and not dataset.select(episodes, rules)[0]:
      print(f'No episode of {source} passes the filter: nothing to train on.')
      return {'trained': 0, 'adapter': c.start_adapter}
    changes = dict(
      data=','.join(map(str, data)), init_adapter=c.start_adapter, epochs=c.epochs / draws,
      drop_memory=policy in ('lora', 'distilled'), **untrained)
    score = None
    if c.candidates > 1:
      changes['checkpoint_every'] = self.steps_between(changes)
      score = lambda model: self.score(folder / 'validation', policy, model)
    trained = self.train(folder, score=score, **changes)
    return {'trained': trained['episodes']['kept'], 'too_long': trained['episodes']['too_long'],
            'best': trained.get('best'), 'training': trained, 'adapter': str(folder / 'adapter')}

  def steps_between(self, changes: dict[str, Any]) -> int:
    """Steps between two of the training's `candidates` checkpoints."""
    config = self.train_config(**changes)
    examples, _, _ = train.load_data(config)
    batches = packing.Batches(
      packing.pack(examples, config.row_len), batch_rows=config.batch_rows,
      grad_accum=config.grad_accum, epochs=config.epochs, seed=config.seed, num_shards=1)
    return math.ceil(batches.num_steps / self.config.candidates)

  def score(self, folder: pathlib.Path, policy: str, model) -> float:
    """Share of the validation games that a policy in training solves.

    It plays as it is trained: with the matched index, or without a memory.

    Args:
      folder: gets a folder for every checkpoint, named after its adapter's content: a run that was
        stopped here goes on with these games.
      policy: its name.
      model: a `decoder.Model`.
    """
    c = self.config
    arrays = jax.device_get(decoder.to_params(model.lora))
    digest = hashlib.sha256()
    for name in sorted(arrays):
      digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    place = folder / digest.hexdigest()[:12]
    weights.export_peft(place / 'adapter', self.base.config, model.lora_config, arrays, self.model)
    episodes = []
    for kind in ('easy', 'validation'):
      if kind == 'validation' and not c.validation_skills:
        continue
      episodes += self.play(
        place / kind, policy=policy, adapter=str(place / 'adapter'), split=c.validation_split,
        episodes=c.validation_games, skip=c.validation_skip if kind == 'easy' else 0,
        **self.tasks_of(kind), **self.memory_keys(kind if policy.startswith('exprag') else ''))
    won = sum(e.success for e in episodes)
    print(f'{policy}: a checkpoint solves {won} of {len(episodes)} validation games', flush=True)
    return won / len(episodes)

  def evaluate(self, folder: pathlib.Path, row: experience_rows.Row) -> dict:
    c = self.config
    episodes = self.play(
      folder, policy=row.policy, adapter=self.adapter(row.policy), split=c.eval_split,
      episodes=c.eval_games, **self.tasks_of(row.split),
      **self.memory_keys(row.bank, row.condition))
    return {**stages.counts(episodes), **self.hits(episodes)}

  def hits(self, episodes: Sequence[trajectory.Episode]) -> dict[str, float]:
    """Share of the episodes whose memory held a success at a task of the same kind.

    That is of the same type and, where one is asked for, the same state.
    """
    kinds = {}
    for path in (self.workdir / 'index').glob('*/bank'):
      for e in experience_lib.ExperienceBank.load(path).experiences:
        kinds[e.id] = e.group
    held = [
      any(r.get('outcome') == 'success' and kinds.get(r['id']) == experience_lib.group_of(
        e.task_type, e.instruction) for r in e.retrieved) for e in episodes]
    return {'same_kind_retrieved': sum(held) / max(1, len(held))} if any(
      e.retrieved for e in episodes) else {}

  def predict(self) -> list[dict[str, Any]]:
    """The parts of the run with their tokens and minutes on this machine."""
    c = self.config
    costs = budget.Costs(c, self.base)
    own, experience = budget.experience_tokens(c, self.base, **self.tasks_of('easy'))
    block = c.experience_k * experience
    games = lambda number: number or 134  # 0 is all; ALFWorld's larger test split
    index_games = c.index_games or 1748
    for policy in self.needed:
      if policy == 'distilled':
        number = len(self.teacher_splits) * (c.teacher_games or 1748)
        costs.play('teacher', number, budget.MODEL_STEPS * own + block)
        costs.train('distilled', round(0.7 * number), own, c.epochs)
        continue
      mean = own if policy == 'lora' else own + block
      costs.train(policy, index_games, mean, c.epochs)
    if c.candidates > 1 and self.needed:
      kinds = 2 if c.validation_skills else 1
      number = len(self.needed) * c.candidates * c.validation_games * kinds
      costs.play('checkpoints', number, budget.MODEL_STEPS * own + block)
    with_memory = sum(row.condition != 'empty' for row in self.rows)
    costs.play(
      'evaluation', len(self.rows) * games(c.eval_games),
      budget.MODEL_STEPS * own + block * with_memory / len(self.rows))
    return costs.parts

  def outcomes(self, played: dict[str, list[trajectory.Episode]]) -> dict[str, Any]:
    """Which games each row won: {'tasks': {split: ids}, 'rows': {row id: 0 or 1 per task}}."""
    tasks, rows = {}, {}
    for split in experience_rows.SPLITS:
      own = summary.outcomes({row.id: played[row.id] for row in self.rows if row.split == split})
      tasks[split] = own['tasks']
      rows |= own['rows']
    return {'tasks': tasks, 'rows': rows}

  def run(self) -> dict[str, Any]:
    """All stages; returns and writes summary.json."""
    c = self.config
    stages.check_splits(c, c.easy_skills)
    workdir_lib.open_workdir(
      self.workdir, {**c.to_dict(), 'dry_run': self.dry}, free_keys=_FREE_KEYS)
    self.train_decoder()
    predicted = stages.predicted(self.workdir, {'evaluate': c.evaluate}, self.predict)
    print(budget.table(predicted), flush=True)
    for kind in self.kinds:
      self.stage(f'index/{kind}', lambda folder, kind=kind: self.index(folder, kind))
    if any(row.condition == 'all' for row in self.rows):
      self.stage('index/all', self.index_all)
    if {'lora', 'exprag_lora'} & set(self.needed):
      self.stage('demonstrations', lambda folder: self.demonstrate(folder, dropout=0.0, draws=1))
    if 'exprag_lora_dropout' in self.needed:
      self.stage('demonstrations_dropout', lambda folder: self.demonstrate(
        folder, dropout=c.dropout_memory, draws=c.dropout_draws))
    for policy in self.needed:
      if policy == 'distilled':
        self.stage('teacher', self.collect)
      self.stage(policy, lambda folder, policy=policy: self.student(folder, policy))
    records, played = [], {}
    for row in self.rows:
      name = f'evaluation/{row.id}'
      done = self.stage(name, lambda folder, r=row: self.evaluate(folder, r))
      played[row.id] = trajectory.load_episodes(self.workdir / name)
      records.append({
        **summary.row(
          played[row.id], id=row.id, policy=row.policy,
          memory='none' if row.condition == 'empty' else 'experience', split=c.eval_split,
          seed=c.seed),
        'tasks': row.split, 'condition': row.condition,
        'same_kind_retrieved': done.get('same_kind_retrieved')})
    rates = {r['id']: r['success_rate'] for r in records}
    record = {
      'experiment': 'experience_retrieval', 'rows': records,
      'paired': [summary.paired(played[a], played[b], a_id=a, b_id=b)
                 for a, b in experience_rows.pairs(self.rows)],
      'collapse': experience_rows.collapse(rates),
      'won': self.outcomes(played),
      'wall_s': self.wall_s, 'predicted': predicted,
      'stages': {name: {key: value for key, value in stage.items()
                        if isinstance(value, (int, float, str)) or key in ('index', 'best')}
                 for name, stage in self.records.items()},
      'config': c.to_dict(), 'versions': summary.versions()}
    workdir_lib.write_json(self.workdir / 'summary.json', record)
    return record


def check(config) -> None:
  """What can be known to be wrong before anything slow starts.

  Raises:
    errors.UserError: no games asked for, a key without meaning, or missing data.
  """
  experience_rows.parse(config.evaluate)
  experience_memory.rules_of(config)
  demonstrations.check_knows(config.expert_knows)
  stages.check_dtypes(config)
  stages.check_data(config.data)
  stages.check_decoder(config)
  if min(config.index_games, config.eval_games, config.teacher_games, config.validation_games) < 0:
    raise errors.UserError('The numbers of games must not be negative (0 is all).')
  if not 0 <= config.failures <= 1 or not 0 < config.error_rate < 1 or config.failure_steps < 1:
    raise errors.UserError(
      'failures lies in 0..1, error_rate between 0 and 1, and failure_steps is at least 1.')
  if not 0 <= config.dropout_memory <= 1 or not 0 <= config.dropout_mismatched <= 1 or (
      config.dropout_draws < 1):
    raise errors.UserError(
      'dropout_memory and dropout_mismatched lie in 0..1, and dropout_draws is at least 1.')
  if config.teacher not in ('frozen', 'exprag_lora', 'exprag_lora_dropout'):
    raise errors.UserError(
      f'teacher is frozen, exprag_lora or exprag_lora_dropout, not {config.teacher!r}.')
  splits = [part.strip() for part in config.teacher_splits.split(',')]
  if not set(splits) <= set(experience_rows.SPLITS):
    raise errors.UserError(
      f'teacher_splits is a list of {", ".join(experience_rows.SPLITS)}, not '
      f'{config.teacher_splits!r}.')
  if config.grow < 1 or config.candidates < 1:
    raise errors.UserError('grow and candidates must be at least 1.')
  if config.candidates > 1 and config.validation_games < 1:
    raise errors.UserError('candidates need validation_games to choose among them.')


def main(_):
  config = flags.FLAGS.config
  config.data = os.path.expandvars(config.data)
  workdir = pathlib.Path(flags.FLAGS.workdir)
  if flags.FLAGS.dry_run:
    config = dry_run.shrink_experience(config)
  check(config)
  record = Experiment(config, workdir, dry=flags.FLAGS.dry_run).run()
  print()
  print(summary.table(record['rows'], [
    pair for pair in record['paired'] if experience_rows.headline((pair['a'], pair['b']))]))
  print('\nsolved, %')
  print(experience_rows.matrix({row['id']: row['success_rate'] for row in record['rows']}))
  print(f'\n{sum(record["wall_s"].values()) / 60:.1f} min in all; {workdir / "summary.json"}')

  for page in report.write(workdir):
    print(f'to look at: {page}')


if __name__ == '__main__':
  cli.define_config_flags()
  flags.DEFINE_bool('dry_run', False, 'Walk all stages with a tiny random model.')
  cli.run(main)
