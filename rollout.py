"""Plays episodes of an agent on a split: data collection and evaluation.

  python rollout.py --config=configs/rollout.py:model=smollm2_135m,env=household,agent=react \
    --workdir=runs/base --config.data=generated --config.split=valid_seen --config.episodes=50

Several processes play one run, each with its own devices, by the same command with
--num_processes=N --process_id=I. See configs/rollout.py for every key. What is slow is imported
where it is needed, so that a mistake in the command is told at once.
"""

import ast
import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from absl import flags

import envs
from agents import episode as episode_lib
from agents import experience_memory, expert_episodes, formats, runner, shares
from agents import memory as memory_lib
from configs import cli, common
from configs import rollout as config_lib
from data import errors, summary, trajectory
from data import workdir as workdir_lib
from envs import base as envs_base
from envs import workers
from retrieval import experience as experience_lib

# Keys that may differ when a run is continued: they change how fast it goes, not what is played.
_FREE_KEYS = (
  'slots', 'slot_groups', 'decode_steps', 'lookup', 'share_prefixes', 'mesh', 'env_workers',
  'env_timeout')


def make_suite(config: ml_collections.ConfigDict) -> envs_base.Suite:
  """The environment suite of the config.

  Raises:
    errors.UserError: an option is malformed or unknown, or the data folder is missing.
  """
  options = {}
  for pair in filter(None, config.env_options.split(';')):
    key, colon, text = (part.strip() for part in pair.partition(':'))
    if not colon or not text:
      raise errors.UserError(
        f'env_options part {pair!r} is not of the form key:value or key:low-high.')
    if key in ('name', 'data'):
      raise errors.UserError(
        f'env_options cannot set {key}; it is the config key {"env" if key == "name" else key}.')
    options[key] = _option_value(text)
  if config.env == 'household':
    count = config.skip + config.episodes if config.episodes else 0
    options = {
      'skills': config.skills, 'seed': config.env_seed,
      'task_types': [t.strip() for t in config.task_types.split(',') if t.strip()],
      # As many games as are played; few-shot examples come from all of the training split.
      'num_train': 0 if config.few_shots else count, 'num_valid': count,
      **options}
    return _in_workers(config, options)
  # Another one gets of the general keys those that it takes.
  taken = envs_base.option_names(envs_base.suite_maker(config.env))
  if 'seed' in taken:
    options = {'seed': config.env_seed, **options}
  if 'num_tasks' in taken and not config.few_shots and config.episodes:
    options = {'num_tasks': config.skip + config.episodes, **options}
  for key in ('skills', 'task_types'):
    if config[key] == config_lib.DEFAULTS[key]:
      continue
    if key not in taken:
      raise errors.UserError(
        f'{key}={config[key]} is for env=household; give {config.env} its options with '
        'env_options=key:value.')
    options = {key: config[key], **options}
  suite = _in_workers(config, options)
  if (config.agent == 'expert' or config.few_shots) and not hasattr(suite, 'expert'):
    raise errors.UserError(
      f'agent=expert and few_shots need a scripted expert, and {config.env} has none; give it a '
      'method expert(task, known_rules).')
  return suite


def _in_workers(config: ml_collections.ConfigDict, options: dict[str, Any]) -> envs_base.Suite:
  """The suite of these options, its environments in processes of their own where config says so."""
  options = {'data': config.data, **options}
  suite = envs.get_suite(config.env, **options)
  if config.env_workers < -1:
    raise errors.UserError('env_workers must be -1 (as the environment needs), 0 or more.')
  environments = 1 if config.agent == 'expert' else _whole_groups(config.slots, config)
  count = config.env_workers
  if count < 0:
    count = workers.default_workers(suite, environments)
  if not count:
    return suite
  if getattr(suite, 'exclusive', False) and count < environments:
    raise errors.UserError(
      f'{suite.name} needs a worker for each of the slots={environments}; set env_workers to as '
      'many (or to -1), or take fewer slots.')
  return workers.WorkerSuite(
    suite, config.env, options, workers=count, timeout=config.env_timeout)


def _whole_groups(slots: int, config: ml_collections.ConfigDict) -> int:
  """So many slots, or the next number that fills all groups."""
  return slots + -slots % config.slot_groups


def _option_value(text: str) -> Any:
  """A number, true or false, a range low-high as a tuple, or else the text itself."""
  if text in ('true', 'false'):
    return text == 'true'
  for parts in ([text], text.split('-')):
    try:
      values = tuple(ast.literal_eval(part) for part in parts)
    except (SyntaxError, ValueError):
      continue
    return values[0] if len(values) == 1 else values
  return text


def check_split(suite: envs_base.Suite, split: str) -> None:
  """Raises errors.UserError for a split that the suite does not have."""
  if split not in suite.splits:
    raise errors.UserError(
      f'{suite.name} has no split {split!r}; it has {", ".join(suite.splits)}.')


def choose_tasks(
  suite: envs_base.Suite, split: str, count: int, skip: int = 0
) -> list[envs_base.Task]:
  """The first `count` tasks of a split after `skip` others; 0 is all of them.

  Raises:
    errors.UserError: the split does not exist, or there are fewer tasks.
  """
  check_split(suite, split)
  if min(count, skip) < 0:
    raise errors.UserError('episodes and skip must not be negative.')
  tasks = suite.tasks(split)
  wanted = skip + max(1, count)
  if len(tasks) < wanted:
    raise errors.UserError(
      f'Split {split} has {len(tasks)} tasks of these types, not {wanted}; ask for fewer, '
      'or check the data folder.')
  return tasks[skip:skip + count] if count else tasks[skip:]


def make_spec(config: ml_collections.ConfigDict) -> episode_lib.AgentSpec:
  """The agent of the config; for agent=expert, in the format that it writes."""
  agent = config.expert_format if config.agent == 'expert' else config.agent
  return episode_lib.AgentSpec(
    format=formats.name_for(agent, config.env),
    layout=config.layout, style=config.prompt, max_env_steps=config.max_env_steps,
    max_calls=config.max_calls, max_repeats=config.max_repeats,
    max_new_tokens=config.max_new_tokens, constrained=config.constrained)


def run(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, base=None,
  share: shares.Share = shares.Share(),  # noqa: B008
) -> None:
  """Plays what `config` says, or what is left of it.

  Args:
    config: as configs/rollout.py makes it.
    workdir: the run's folder.
    base: an `agents.policy.Base` that is loaded already; None loads what the config names.
    share: which of several processes this is; the last one to be ready writes the summary.
  """
  started = time.perf_counter()

  # 1. What a person can get wrong is checked before anything slow, and before anything is written.
  expert = config.agent == 'expert'
  if expert and config.constrained:
    raise errors.UserError('constrained restricts what a model samples; it needs another agent.')
  spec = make_spec(config)
  memory_lib.check_kind(config.memory)
  kinds = config.memory.split('+')
  if 'hints' in kinds and not config.bank:
    raise errors.UserError('memory=hints needs bank=FILE, the bank of python -m retrieval.hints.')
  check_experiences(config)
  adapters = choose_policies(config)
  if config.grow and share.count > 1:
    raise errors.UserError(
      'With grow the order of the episodes counts; play them in one process (num_processes=1).')
  common.check_engine(config)
  if config.slot_groups < 1:
    raise errors.UserError('slot_groups must be at least 1.')
  from agents import policy as policy_lib
  if not expert:
    config = config.copy_and_resolve_references()
    config.dtype = policy_lib.settle_dtype(config, base, workdir)
  workdir_lib.check_workdir(workdir, config.to_dict(), free_keys=_FREE_KEYS)
  suite = make_suite(config)
  tasks = choose_tasks(suite, config.split, config.episodes, config.skip)
  if found := _finished_summary(workdir, tasks, list(adapters)):
    show(workdir, found)
    return
  index = experiences = None
  if 'hints' in kinds:
    index = memory_lib.load_index(config.bank, config.retrieval, workdir / 'hint_vectors.npz')

  if 'experience' in kinds:
    experiences = experience_memory.load(
      config.experiences, config.experience_retrieval, config.query, keep=not config.grow,
      exact_below=config.exact_below, leaves_searched=config.leaves_searched)
  if config.grow:
    tasks = experience_memory.task_order(tasks, config.seed)

  # 2. The policy. The expert needs a tokenizer only: its replies get the ids a model would sample.
  if expert:
    model_name = 'expert'
    tokenizer = policy_lib.load_tokenizer(config.model, config.base, config.tokenizer)
  else:
    for folder in adapters.values():
      policy_lib.check_adapter(folder)
    if base is None:
      base = policy_lib.load_base(
        config.model, config.base, tokenizer=config.tokenizer, shrink=config.shrink,
        dtype=config.dtype, base_quantization=config.base_quantization, seed=config.seed)
    if config.max_context > base.config.max_position:
      raise errors.UserError(
        f'max_context={config.max_context} is more than the {base.config.max_position} positions '
        f'that {base.name} was trained for; set max_context to that or less.')
    model_name, tokenizer = base.name, base.tokenizer

  # 3. What each episode has in its prompt, chosen once at its start (paper A, step 3), or for
  # dynamic queries before every call.
  memories, examples, memory = {}, {}, None
  if index is not None:
    memories = memory_lib.retrieve_hints(
      index, suite, tasks, config.k, method=config.retrieval,
      leave_one_out=config.leave_one_out, seed=config.seed)
  if experiences is not None:
    experiences.bank.check(
      spec.format, experience_memory.prompt_of(tokenizer, spec, suite), tokenizer.fingerprint)
    memory = experience_memory.ExperienceMemory(
      experiences, experience_memory.rules_of(config), tokenizer, memories)
    if config.query == 'static' and not config.grow:
      memories = memory.choose(tasks)
  if config.few_shots:
    examples = expert_episodes.few_shot_examples(
      suite, {task.task_type for task in tasks}, tokenizer, spec, config.few_shots,
      exclude={task.id for task in tasks}, thoughts=config.expert_thoughts)

  # 4. Play.
  players = [
    episode_lib.Labels(name, model_name, config.split, config.seed) for name in adapters]
  labels, games = players[0], episode_lib.games(tasks, players)
  if not expert:
    runner.check_first_prompt(
      config.max_context, tokenizer, suite, tasks, spec, labels, memories=memories,
      examples=examples)
    from inference import Engine, SamplingConfig, Stats
    slots = _whole_groups(config.slots, config)
    mesh = choose_mesh(config.mesh, base.config, slots, config.slot_groups)
    if mesh is None:
      slots = _whole_groups(min(config.slots, -(-len(games) // share.count)), config)
    engine = Engine(
      base.policies(list(adapters.values()), mesh=mesh), num_slots=slots,
      max_len=config.max_context,
      stop_ids=tokenizer.stop_ids, sampling=SamplingConfig(temperature=config.temperature),
      mesh=mesh, share_prefixes=config.share_prefixes, groups=config.slot_groups,
      **policy_lib.engine_options(config))
  # Last of all that bad input can stop: from here on the folder refuses every other config.
  with shares.locked(workdir) if share.count > 1 else contextlib.nullcontext():
    workdir_lib.open_workdir(workdir, config.to_dict(), free_keys=_FREE_KEYS)
  folder = share.folder(workdir)
  if share.count == 1:
    shares.take_over(workdir)
  else:
    playing = shares.Playing(folder)
  own = share.games(workdir, games)

  def counts() -> dict[str, dict[str, float]]:
    return {'engine': {} if expert else dataclasses.asdict(engine.stats),
            'env_workers': suite.summary() if isinstance(suite, workers.WorkerSuite) else {}}

  counters = workdir_lib.RunCounts(folder, started=started, counts=counts)
  erring = {'error_rate': config.expert_error_rate} if config.expert_error_rate else {}
  played = {
    'recall': memory.recall if config.query == 'dynamic' and memory is not None else None,
    'after_episode': counters.save}
  try:
    if not own:
      episodes = []
    elif expert:
      episodes = runner.play_each(
        lambda task: expert_episodes.expert_episode(
          suite, task, tokenizer, spec, labels, thoughts=config.expert_thoughts,
          memory=memories.get(task.id, memory_lib.NO_MEMORY),
          examples=examples.get(task.task_type, ()),
          known_rules=envs_base.rules_of(suite, task) if config.expert_knows_rules else (),
          **erring),
        [game.task for game in own], labels, folder, after_episode=counters.save)
    else:
      play = functools.partial(
        runner.play, engine, tokenizer, suite, spec=spec, workdir=folder, examples=examples,
        **played)
      if config.grow:
        episodes = play_and_remember(play, games, memory, config.grow, workdir)
      else:
        episodes = play(own, memories=memories)
  finally:
    counters.save()
    if close := getattr(suite, 'close', None):
      close()

  # 5. The rows.
  counted = {'wall_s': counters.seconds(), 'engine': {}, 'env_workers': {}, **counters.counts()}
  if not expert:
    counted['engine'] = Stats(**counted['engine']).as_dict()

  def write(episodes: Sequence[trajectory.Episode], **more: Any) -> None:
    by_row = {
      name if config.memory == 'none' else f'{name}+{config.memory}':
      [episode for episode in episodes if episode.policy == name] for name in adapters}
    rows = [
      summary.row(own, id=id_, policy=own[0].policy, memory=config.memory, split=config.split,
                  seed=config.seed)
      for id_, own in by_row.items()]
    # Each against the first, over the same tasks.
    (first, before), *others = by_row.items()
    pairs = [summary.paired(own, before, a_id=id_, b_id=first) for id_, own in others]
    written = {'rows': rows, 'paired': pairs, 'versions': summary.versions(), **more}
    workdir_lib.write_json(workdir / 'summary.json', written)
    show(workdir, written)

  if share.count == 1:
    write(episodes, **{**counted, 'wall_s': {'rollout': counted['wall_s']}})
    return
  shares.record(folder, counted)
  with shares.locked(workdir):
    playing.end()
    if before := _finished_summary(workdir, tasks, list(adapters)):
      show(workdir, before)
      shares.clean(workdir)
    elif found := shares.gather(workdir, [game.id for game in games]):
      episodes, records = found
      write(
        episodes, wall_s={'rollout': max(r['wall_s'] for r in records)}, processes=records)
      shares.clean(workdir)
    else:
      print(f'process {share.index} of {share.count} has played its {len(own)} episodes; others '
            'are left', file=sys.stderr)


def choose_policies(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Name in the record -> PEFT folder ('' for the base) of all that play, checked.

  Raises:
    errors.UserError: `adapters` names one policy, or stands beside a key that says who plays.
  """
  expert = config.agent == 'expert'
  if not config.adapters:
    return {config.policy or (
      experience_lib.ERRING_EXPERT if config.expert_error_rate else 'expert' if expert else
      'adapter' if config.adapter else 'base'): config.adapter}
  found = common.read_adapters(config.adapters)
  if len(found) < 2:
    raise errors.UserError(
      f'adapters={config.adapters} names one policy; give several to compare, or adapter=FOLDER.')
  for key, given in (('adapter', config.adapter), ('policy', config.policy),
                     ('grow', config.grow), ('agent=expert', expert)):
    if given:
      raise errors.UserError(
        f'adapters names the policies that play side by side, and {key} does not go with it; leave '
        'one of the two out.')
  return found


def check_experiences(config: ml_collections.ConfigDict) -> None:
  """What can be wrong about experiences, said before anything is loaded.

  Raises:
    errors.UserError: a key has no meaning, or lacks another one.
  """
  experience_memory.rules_of(config)
  retrieves = 'experience' in config.memory.split('+')
  if retrieves and not config.experiences and not config.grow:
    raise errors.UserError(
      f'memory={config.memory} needs experiences=FOLDER, the bank of '
      'python -m retrieval.experience (or grow=N, which starts from none).')
  if config.grow < 0 or (config.grow and not retrieves):
    raise errors.UserError('grow needs memory=experience, and a number of episodes from 1 on.')
  if config.agent == 'expert' and (config.grow or (retrieves and config.query == 'dynamic')):
    raise errors.UserError('A scripted expert plays with query=static and grow=0.')
  if not 0 <= config.expert_error_rate < 1 or (
      config.expert_error_rate and config.agent != 'expert'):
    raise errors.UserError('expert_error_rate lies in 0..1 (1 excluded) and needs agent=expert.')


def choose_mesh(text: str, architecture, slots: int, groups: int = 1):
  """The devices that play together, as `mesh=` names them.

  Args:
    text: sizes as `models.sharding.parse_sizes` takes them; '' is one device.
    architecture: the `decoder.DecoderConfig` of what plays.
    slots: episodes at a time, of all devices.
    groups: equal parts of the slots that take turns.

  Returns:
    A mesh, or None for one device.

  Raises:
    errors.UserError: no sizes, more than the devices, or slots or heads that do not divide.
  """
  if not text:
    return None
  from models import sharding

  mesh = sharding.make_mesh(**sharding.parse_sizes(text))
  if slots // groups % mesh.shape['data']:
    parts = f' in {groups} groups' if groups > 1 else ''
    raise errors.UserError(
      f'slots={slots}{parts} does not divide into the {mesh.shape["data"]} data shards of the '
      'mesh.')
  if architecture.num_kv_heads % mesh.shape['tensor']:
    raise errors.UserError(
      f'tensor={mesh.shape["tensor"]} of the mesh does not divide the {architecture.num_kv_heads} '
      f'key-value heads of {architecture.name}.')
  return mesh


def play_and_remember(
  play: Callable[..., list[trajectory.Episode]], games: Sequence[episode_lib.Game],
  memory: experience_memory.ExperienceMemory, every: int, workdir: pathlib.Path,
) -> list[trajectory.Episode]:
  """Plays games in their order; after every `every` of them the episodes join the bank.

  What a game can remember depends on the order of the games alone, not on which slot was faster,
  and a run that was stopped finds the same bank again. The grown bank is kept in the workdir.

  Args:
    play: `runner.play` but for games and memories.
    games: of tasks in the order of `experience_memory.task_order`, of one policy.
    memory: of the bank as it is at the start.
    every: games between two additions.
    workdir: the run's folder.
  """
  memories: dict[str, memory_lib.Memory] = {}
  episodes: list[trajectory.Episode] = []
  for end in range(every, len(games) + every, every):
    group = games[end - every:end]
    if memory.index.query == 'static':
      memories |= memory.choose([game.task for game in group])
    episodes = play(games[:end], memories=memories, progress=end == every)
    memory.add(episodes[end - every:], str(workdir))
  memory.index.bank.save(workdir / 'experiences')
  return episodes


def _finished_summary(
  workdir: pathlib.Path, tasks: Sequence[envs_base.Task], policies: Sequence[str]
) -> dict[str, Any] | None:
  """The summary of a run in which all policies have played all tasks; None where one is left."""
  try:
    found = json.loads((workdir / 'summary.json').read_text())
    whole = [row['policy'] for row in found['rows']] == list(policies) and all(
      row['n'] == sum(row['terminations'].values()) == len(tasks) for row in found['rows'])
  except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
    return None
  if not whole or not (workdir / trajectory.TFDS_NAME).exists():
    return None
  episodes = trajectory.read_episodes(workdir / trajectory.JOURNAL_NAME)
  played = {(episode.policy, episode.task_id) for episode in episodes}
  left = {(policy, task.id) for policy in policies for task in tasks} - played
  return None if left else found


def show(workdir: pathlib.Path, written: dict[str, Any]) -> None:
  """Prints the rows of the run, by what their episodes ended, and what the engine computed."""
  rows = written['rows']
  print(summary.table(rows, written['paired']))
  if dropped := max(row.get('memory_dropped_mean', 0) for row in rows):
    print(f'{dropped:.2f} experiences an episode did not fit into memory_tokens')
  if restarts := sum(row.get('env_restarts', 0) for row in rows):
    print(f'{restarts} time(s) an episode was played again: the process of its environment died')
  for row in rows:
    ended = ', '.join(f'{name} {n}' for name, n in row['terminations'].items())
    print(f'{row["id"]} ended by: {ended}' if len(rows) > 1 else f'ended by: {ended}')
  for record in (written, *written.get('processes', ())):
    if line := summary.engine_line(record.get('engine', {})):
      print(line)
  print(f'episodes in {workdir / trajectory.JOURNAL_NAME}', file=sys.stderr)


def main(_):
  run(
    flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir),
    share=shares.Share(flags.FLAGS.process_id, flags.FLAGS.num_processes))


if __name__ == '__main__':
  cli.define_config_flags()
  flags.DEFINE_integer('num_processes', 1, 'That play this run together.')
  flags.DEFINE_integer('process_id', 0, 'Which one this is, from 0.')
  cli.run(main)
