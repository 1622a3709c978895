"""A small decoder trained from random weights, as the base of an experiment.

  python -m experiments.from_scratch --config=configs/from_scratch.py --workdir=runs/scratch
  python -m experiments.hint_distillation \
    --config=configs/hint_distillation.py:model=runs/scratch/small_decoder,... --workdir=runs/small

An experiment whose key `decoder` names a setting of configs/from_scratch.py does the first itself.

It learns to act and to read hints from expert episodes alone, and every house of its training calls
its states by invented words: no state is ever seen twice, so a hint or a label helps only a model
that copies from it. That is what carries over to the loop's skills, whose words it never saw.
In another environment it learns from the expert's episodes as they are, in a catalogue of its own
where the environment generates one; WebShop's shopper forgets, in some categories, what no hint
reminds it of.

The run's folder holds tokenizer/ (byte-level BPE, trained here), checkpoints/, metrics.jsonl,
summary.json and small_decoder/, a Hugging Face folder.
"""

import dataclasses
import json
import pathlib
import random
import re
import shutil
import string
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
import tqdm
from absl import flags

import rollout
import train
from agents import episode as episode_lib
from agents import expert_episodes, formats
from agents import memory as memory_lib
from configs import cli
from configs import rollout as rollout_config
from data import bpe, errors, summary, trajectory
from data import workdir as workdir_lib
from data.tokenizer import Tokenizer
from envs import base as envs_base
from envs import household, household_expert, household_games, household_skills
from envs.base import Decision, Environment, ScriptedExpert, StepResult, Suite, Task
from experiments import warm_start
from retrieval import experience as experience_lib
from retrieval import hint_rules
from training import dataset, packing

_DRILL_RULES = (1, 4)  # in one drill, from and to; one alone is the first step of looking it up
_SEARCHED = 5  # appliances of a search drill, as in the games
_SAMPLED_LESSONS = 40  # of which the cost is predicted
_OTHER_WORLD = 1000  # added to the seed: the ids of products begin alike in both catalogues

# Also the model's name in the record of what it plays.
MODEL_FOLDER = 'small_decoder'

_POOL = household_skills.POOLS['warm']
_STATE = re.compile(rf'\b(?:{"|".join(_POOL)})\b')
# Words that stay what they are: nothing invented may be one of them.
_TAKEN = frozenset(
  word for words in (
    *household_skills.POOLS.values(), household_skills.VERBS, household_skills.APPLIANCES)
  for word in words)


def _letter_chain() -> dict[str, str]:
  """Letter -> the letters that follow it in the game's words, as often as they do.

  '' begins a word. Every letter may follow every other one now and then, so that no pair of
  letters is unknown to the model.
  """
  chain = dict.fromkeys(('', *string.ascii_lowercase), string.ascii_lowercase)
  for word in (*_POOL, *household_skills.VERBS, *household_skills.APPLIANCES):
    for before, after in zip(('', *word), word, strict=False):
      chain[before] += 12 * after
  return chain


_CHAIN = _letter_chain()


def invent_word(rng: random.Random) -> str:
  """A word of 4 to 7 letters that sounds like the game's and is none of them."""
  while True:
    word = ''
    for _ in range(rng.randint(4, 7)):
      word += rng.choice(_CHAIN[word[-1:]])
    if word not in _TAKEN:
      return word


def invented_states(key: str) -> dict[str, str]:
  """State of the warm pool -> the word for it in the episode of that key; all are different."""
  rng, words = random.Random(f'words {key}'), {}
  for state in _POOL:
    word = invent_word(rng)
    while word in words.values():
      word = invent_word(rng)
    words[state] = word
  return words


def rename(task: Task, words: dict[str, str]) -> Task:
  """The task with other words for its states: instruction, house and rules; the id stays."""
  payload = {
    **task.payload,
    'problem': _reworded(task.payload['problem'], words),
    'rules': [{**rule, 'state': words[rule['state']]} for rule in task.payload['rules']],
  }
  return dataclasses.replace(
    task, instruction=_reworded(task.instruction, words), payload=payload)


def _reworded(text: str, words: dict[str, str]) -> str:
  return _STATE.sub(lambda match: words[match[0]], text)


class _Recorded:
  """A suite whose expert has played each task at most once: its games are told again, not played.

  A simulator takes a second for a lesson that tokenizer, prediction and training ask for.
  """

  def __init__(self, suite: Suite, games: dict[str, list]):
    """`games`, which is filled: task id -> limits, first observation, (decision, result) a step."""
    self._suite, self._games = suite, games
    self.action_templates = suite.action_templates

  def make(self, task: Task) -> Environment:
    return _Told(self._games[task.id])

  def expert(self, task: Task, known_rules: Sequence = (), **options) -> ScriptedExpert:
    return _Told(self._games[task.id])

  def play(self, task: Task) -> None:
    """Plays a task that has not been."""
    if task.id in self._games:
      return
    environment, expert = self._suite.make(task), self._suite.expert(task)
    observation, steps = environment.reset(), []
    limits = envs_base.limits_of(environment)
    game = [limits, observation]
    while len(steps) < limits.steps:
      decision = expert.act(observation)
      result = environment.step(decision.action)
      observation = result.observation
      steps.append((decision, result))
      if result.done:
        break
    if close := getattr(environment, 'close', None):
      close()
    self._games[task.id] = [*game, *steps]


class _Told:
  """Environment and expert of a recorded game."""

  def __init__(self, game: Sequence):
    self.limits, self._start, *self._steps = game
    self._moves = iter([decision for decision, _ in self._steps])
    self._results = iter([result for _, result in self._steps])

  def reset(self) -> str:
    return self._start

  def act(self, observation: str) -> Decision:
    return next(self._moves)

  def step(self, action: str) -> StepResult:
    return next(self._results)


class Lessons:
  """Expert episodes, in houses with invented states, made anew wherever they are needed."""

  def __init__(self, config):
    """Describes them; nothing is played yet. `config` is as configs/from_scratch.py makes it."""
    self._config = config
    values = {key: config[key] for key in rollout_config.DEFAULTS if key in config}
    values['env_options'] = ';'.join(filter(None, (config.env_options, config.lesson_options)))
    if config.env == 'household':
      values.update(skills='warm', env_seed=config.seed)
    else:
      # What is generated is another world than the experiment's.
      values.update(env_seed=config.seed + _OTHER_WORLD, agent='expert', expert_format=config.agent)
      # In this process: one simulator finds the paths and plays them.
      values['env_workers'] = 0
    self._rollout = rollout_config.make(values)
    self._spec = rollout.make_spec(self._rollout)
    self._games: dict[str, list] = {}
    self._erring = {}
    if config.expert_error_rate:
      self._erring = {'error_rate': config.expert_error_rate, 'seed': config.seed}
    if config.env != 'household':
      self._spec = expert_episodes.expert_spec(self._spec)

  def play(
    self, tokenizer: Tokenizer, split: str | None, count: int, *, hint_share: float | None = None,
    rule_share: float | None = None,
  ) -> Iterator[trajectory.Episode]:
    """The first `count` episodes of a split, None being the environment's last, its test.

    The shares are the config's where none are given.
    """
    c = self._config
    hint_share = c.warm_hint_share if hint_share is None else hint_share
    rule_share = c.warm_rule_share if rule_share is None else rule_share
    self._rollout.episodes = count
    suite = rollout.make_suite(self._rollout)
    split = suite.splits[-1] if split is None else split
    labels = episode_lib.Labels('expert', 'expert', split, c.seed)
    tasks = rollout.choose_tasks(suite, split, count)
    if c.env != 'household':
      yield from self._play_as_it_is(suite, tasks, tokenizer, labels, hint_share, rule_share)
      return
    for task in tasks:
      rng = random.Random(f'lesson {c.seed} {task.id}')
      words = invented_states(f'{c.seed} {task.id}')
      memory, told = memory_lib.NO_MEMORY, []
      if rng.random() < hint_share:
        memory, told = warm_start.hint_block(
          task, suite.rules(task), rng, k=c.k, rule_share=rule_share, seed=c.seed)
        texts = [hint['text'] for hint in memory.retrieved]
        memory = memory_lib.hints([_reworded(text, words) for text in texts])
        told = [dataclasses.replace(rule, state=words[rule.state]) for rule in told]
      yield expert_episodes.expert_episode(
        suite, rename(task, words), tokenizer, self._spec, labels, memory=memory,
        known_rules=told, **self._erring)

  def _play_as_it_is(
    self, suite: Suite, tasks: Sequence[Task], tokenizer: Tokenizer, labels: episode_lib.Labels,
    hint_share: float, rule_share: float,
  ) -> Iterator[trajectory.Episode]:
    """Episodes of an environment whose words are not invented; the suite is closed after them."""
    c = self._config
    solved: dict[str, str] = {}
    recorded = _Recorded(suite, self._games) if getattr(suite, 'own_process', False) else None
    try:
      for task in tasks:
        if recorded:
          recorded.play(task)
        rng = random.Random(f'lesson {c.seed} {task.id}')
        memory, told = memory_lib.NO_MEMORY, []
        if c.env == 'webshop' and rng.random() < hint_share:
          memory, told = warm_start.reminder_block(task, rng, k=c.k, rule_share=rule_share)
        elif task.task_type in solved and rng.random() < c.experience_share:
          memory = memory_lib.Memory('experience', ({
            'id': 'given-0', 'score': 0.0, 'text': solved[task.task_type], 'outcome': 'success'},))
        episode = expert_episodes.expert_episode(
          recorded or suite, task, tokenizer, self._spec, labels, memory=memory, known_rules=told,
          **self._erring)
        if episode.success and c.experience_share:
          # The next lesson of the type may have it in its context.
          solved[task.task_type] = experience_lib.get_format(c.experience_format)(
            experience_lib.from_episode(episode, tokenizer, ''))
        yield episode
    finally:
      if close := getattr(suite, 'close', None):
        close()


def drill(tokenizer: Tokenizer, seed: int, index: int, agent: str = 'plain') -> packing.Example:
  """Some rules as hints, and for each, in another order, what an expert replies who has read it.

  An episode asks for a rule once or twice in 300 tokens; here nearly every token of the loss does,
  and what looks a rule up forms sooner. Before an expert's replies stands the task, without a loss.
  The rules are a warm episode's: no (verb, appliance) pair of the loop's or the hard table.
  """
  key = f'drill {seed} {index}'
  rng = random.Random(key)
  words = invented_states(key)
  rules = [
    dataclasses.replace(rule, state=words[rule.state])
    for rule in rng.sample(
      household_skills.draw('warm', seed, key), rng.randint(*_DRILL_RULES))]
  hints = [f'- {hint_rules.rule_hint(r.state, r.verb, r.appliance)}\n' for r in rules]
  pieces = [(''.join(hints), False)]
  rng.shuffle(rules)
  reply_format = formats.get_format(agent)
  for rule in rules:
    thing, place = rng.choice(household_games.SKILL_THINGS).lower(), f'{rule.appliance} 1'
    goal = f'make a {rule.state} {thing}.'
    pieces.append((f'{goal}\n', False))
    for action, thought in (
        (f'go to {place}', household_expert.plan_thought(rule)),
        (f'{rule.verb} {thing} 1 with {place}', household_expert.use_thought(rule))):
      replies = reply_format.render(Decision(action, thought), goal, ())
      pieces += [(f'{reply}\n', True) for reply in replies]
  return _drilled(tokenizer, pieces, key)


def search_drill(
  tokenizer: Tokenizer, seed: int, index: int, agent: str = 'plain'
) -> packing.Example:
  """A room, a goal, and labels one after the other: what an expert replies to each.

  Whether a label tells the state of the goal, and which appliance is the next of the room, is asked
  once or twice in an episode of 500 tokens; here after every label. The game lists its rooms by the
  alphabet, these are in any order: in the game's a small decoder learned which appliance follows
  another one in the alphabet, and not to look it up.
  """
  key = f'search drill {seed} {index}'
  rng = random.Random(key)
  words = invented_states(key)
  rules = [
    dataclasses.replace(rule, state=words[rule.state])
    for rule in rng.sample(household_skills.draw('warm', seed, key), _SEARCHED)]
  wanted = rng.choice(rules)
  thing = rng.choice(household_games.SKILL_THINGS).lower()
  room = [f'{rule.appliance} 1' for rule in rules]
  for name in rng.sample(household_games.SURFACES, rng.randint(1, 2)):
    room.insert(rng.randint(0, len(room)), f'{name.lower()} 1')
  goal = f'make a {wanted.state} {thing}.'
  pieces = [(f'You see {household.listing(room)}.\nYour task is to: {goal}\n', False)]
  reply_format = formats.get_format(agent)
  for rule in rules:
    place = f'{rule.appliance} 1'
    decision = Decision(
      f'go to {place}', household_expert.search_thought(wanted.state, place))
    replies = reply_format.render(decision, goal, ())
    pieces += [(f'{reply}\n', True) for reply in replies]
    pieces.append((f'On the {place}, you see nothing. {household.label(rule)}\n', False))
    if rule is wanted:
      break
  decision = Decision(
    f'{rule.verb} {thing} 1 with {place}', household_expert.use_thought(rule))
  pieces += [(f'{reply}\n', True) for reply in reply_format.render(decision, goal, ())]
  return _drilled(tokenizer, pieces, key)


def _drilled(
  tokenizer: Tokenizer, pieces: Sequence[tuple[str, bool]], key: str
) -> packing.Example:
  """One example of (text, whether it has a loss)."""
  tokens, mask = [], []
  for text, loss in pieces:
    ids = tokenizer.encode(text)
    tokens += ids
    mask += [loss] * len(ids)
  return packing.Example(np.array(tokens, np.int32), np.array(mask), key)


def make_tokenizer(
  lessons: Lessons, vocab_size: int, count: int, folder: pathlib.Path
) -> Tokenizer:
  """The tokenizer in `folder`, trained on `count` expert episodes where there is none yet.

  The episodes are played with a tokenizer of bytes, which spells the same text.
  """
  if not (folder / 'tokenizer_config.json').exists():
    bytes_only = folder.with_name(f'{folder.name}.bytes')
    bpe.train([], bpe.MIN_VOCABULARY, bytes_only)
    speller = Tokenizer.load(bytes_only)
    episodes = lessons.play(speller, 'train', count)
    bpe.train(
      (speller.decode(e.tokens, skip_special=False) for e in episodes), vocab_size, folder)
    shutil.rmtree(bytes_only)
  return Tokenizer.load(folder)


def make_config(config, vocab_size: int):
  """The decoder's architecture, with a head for `vocab_size` tokens.

  Raises:
    errors.UserError: the heads do not divide the width.
  """
  from models import decoder

  if config.embed_dim % (2 * config.num_heads):
    raise errors.UserError(
      f'embed_dim={config.embed_dim} does not divide into {config.num_heads} heads of an even '
      'width; change embed_dim or num_heads.')
  return decoder.DecoderConfig(
    name=MODEL_FOLDER, family='llama', vocab_size=vocab_size,
    embed_dim=config.embed_dim, num_layers=config.num_layers, num_heads=config.num_heads,
    num_kv_heads=config.num_kv_heads, head_dim=config.embed_dim // config.num_heads,
    mlp_dim=config.mlp_dim, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True,
    max_position=config.max_context, dtype=config.dtype, frozen=False)


def initial_model(architecture, seed: int, mesh):
  """Random weights to train from: tokens that keep their identity from layer to layer.

  Embeddings have the size of what a norm gives (1), kernels keep the size of what goes through them
  (one over the root of the width), and what is added to the residual stream is divided by the root
  of the number of additions, as GPT-2 does it. The final norm begins at one over the root of the
  width, so that the tied head's logits begin at about 1.

  With embeddings and kernels of 0.02, as GPT-2 has them, a small decoder learned to spell an
  invented word that it had read; which of several things or places is meant it looked up in one of
  two runs of 13 million tokens. From here it does after 4 million.
  """
  from models import decoder

  params = {}
  for name, value in decoder.to_params(decoder.create(architecture, seed=seed).lora).items():
    value = np.asarray(value)
    if name == 'embed.embedding':
      value = value / value.std()
    elif name == 'final_norm.scale':
      value = value * architecture.embed_dim ** -0.5
    elif name.endswith(('.o.kernel', '.down.kernel')):
      value = value / (2 * architecture.num_layers) ** 0.5
    params[name] = value.astype(np.float32)
  return decoder.from_params(architecture, params, mesh=mesh)


def start_from(config, tokenizer_folder: pathlib.Path):
  """The decoder that `config.start_decoder` names, to be trained further.

  Args:
    config: as configs/from_scratch.py makes it, its dtype settled.
    tokenizer_folder: gets the decoder's tokenizer.

  Returns:
    (`decoder.DecoderConfig`, flat float32 parameters).

  Raises:
    errors.UserError: there is no decoder.
  """
  from models import weights

  architecture, params = weights.load_pretrained(config.start_decoder, 'float32')
  copy_tokenizer(pathlib.Path(config.start_decoder), tokenizer_folder)
  return dataclasses.replace(
    architecture, name=MODEL_FOLDER, max_position=config.max_context, dtype=config.dtype,
    frozen=False), params


def copy_tokenizer(source: pathlib.Path, folder: pathlib.Path) -> None:
  """Puts the tokenizer of one folder into another one, which is made where it is missing."""
  folder.mkdir(parents=True, exist_ok=True)
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    shutil.copyfile(source / name, folder / name)


def reply_accuracy(model, state, episodes: Sequence[trajectory.Episode]) -> dict[str, float]:
  """How well the model continues experts that it has not seen (teacher forcing, greedy).

  Returns:
    'replies': share of all replies of which every token is the likeliest one; 'rule': the same for
    the first reply of a solved task that says the verb of its last command, which has to be looked
    up there (what follows may repeat it); 'label': the same for those to a label, which may tell
    the goal's state or not.
  """
  import jax

  from models import decoder

  @jax.jit
  def predict(trained, frozen, tokens):
    hidden = decoder.forward(
      model.graphdef, trained, frozen, tokens, np.arange(tokens.shape[1])[None])
    kernel = decoder.output_kernel(trained, model.config)
    return jax.numpy.einsum('btd,vd->btv', hidden, kernel).argmax(-1)[0]

  width = max(len(episode.tokens) for episode in episodes)
  right, rule, label = [], [], []
  for episode in episodes:
    # Padding follows the episode, and no token sees what follows it.
    tokens = np.zeros((1, width), np.int32)
    tokens[0, :len(episode.tokens)] = episode.tokens
    likeliest = np.asarray(predict(state.lora, model.frozen, tokens))
    action = np.flatnonzero(episode.kinds == trajectory.KIND['action'])
    replies = np.split(action, np.flatnonzero(np.diff(action) > 1) + 1)
    found = [bool((likeliest[r - 1] == episode.tokens[r]).all()) for r in replies]
    right += found
    if episode.success:
      verb = re.compile(rf'\b{re.escape(episode.steps[-1].action.split()[0])}\b')
      rule.append(next(right for right, step in zip(found, episode.steps, strict=True)
                       if verb.search(step.reply)))
    label += [after for after, step in zip(found[1:], episode.steps, strict=False)
              if household.LABEL in step.observation]
  return {name: float(np.mean(values or [0.0])) for name, values in (
    ('replies', right), ('rule', rule), ('label', label))}


def predict(config, lessons: Lessons, tokenizer: Tokenizer, architecture) -> dict[str, float]:
  """What the run will cost on this machine, from a few lessons.

  Returns:
    'tokens': trained ones; 'minutes': of the training, the lessons' own not counted.
  """
  from models import cost
  from training import speed

  own = [len(e.tokens) for e in lessons.play(
    tokenizer, 'train', min(_SAMPLED_LESSONS, config.episodes))]
  tokens = config.episodes * np.mean(own)
  for make, count in ((drill, config.drills), (search_drill, config.search_drills)):
    sampled = [len(make(tokenizer, config.seed, index, config.agent).tokens)
               for index in range(min(_SAMPLED_LESSONS, count))]
    tokens += count * np.mean(sampled or [0])
  tokens *= config.epochs
  flops = cost.train_flops(architecture, None, tokens, tokens, np.mean(own) / 2)
  seconds = speed.predict_seconds(flops, speed.product_rate(config.dtype))
  return {'tokens': float(tokens), 'minutes': seconds / 60}


def check(config) -> None:
  """What can be known to be wrong before anything is played.

  Raises:
    errors.UserError: a number or a name without meaning.
  """
  from training import optimizer

  train.check(config)
  if min(config.episodes, config.tokenizer_episodes, config.held_out_episodes) < 1 or (
      min(config.drills, config.search_drills) < 0):
    raise errors.UserError(
      'episodes, tokenizer_episodes and held_out_episodes must be at least 1, drills and '
      'search_drills at least 0.')
  experience_lib.get_format(config.experience_format)
  if (config.drills or config.search_drills) and config.env != 'household':
    raise errors.UserError(
      f'drills are about houses; set drills=0 and search_drills=0 with env={config.env}.')
  for name in ('embed_dim', 'num_layers', 'num_heads', 'num_kv_heads', 'mlp_dim'):
    if config[name] < 1:
      raise errors.UserError(f'{name} must be at least 1.')
  settled = config.copy_and_resolve_references()
  if settled.dtype == 'auto':
    settled.dtype = 'float32'  # Whichever it will be: the architecture is the same.
  make_config(settled, bpe.check_size(config.vocab_size))
  optimizer.make_schedule(config.schedule, config.learning_rate, 1, config.warmup_fraction)


def run(config, workdir: str | pathlib.Path) -> dict:
  """Makes the model folder, or goes on, or does nothing where it is finished.

  Args:
    config: as configs/from_scratch.py makes it.
    workdir: the run's folder.

  Returns:
    The content of summary.json.
  """
  from training import speed

  started = time.perf_counter()
  workdir = pathlib.Path(workdir)
  check(config)
  config = config.copy_and_resolve_references()
  config.dtype = speed.settle_dtype(config.dtype, workdir)
  workdir_lib.check_workdir(workdir, config.to_dict(), free_keys=train.FREE_KEYS)
  summary_path = workdir / 'summary.json'
  if summary_path.exists():
    print(f'{workdir} is finished already.', file=sys.stderr)
    return json.loads(summary_path.read_text())
  workdir_lib.open_workdir(workdir, config.to_dict(), free_keys=train.FREE_KEYS)

  lessons = Lessons(config)
  params = None
  if config.start_decoder:
    architecture, params = start_from(config, workdir / 'tokenizer')
    tokenizer = Tokenizer.load(workdir / 'tokenizer')
  else:
    tokenizer = make_tokenizer(
      lessons, config.vocab_size, config.tokenizer_episodes, workdir / 'tokenizer')
    architecture = make_config(config, tokenizer.vocab_size)
  predicted = predict(config, lessons, tokenizer, architecture)
  print(f'{config.episodes} lessons and {config.drills + config.search_drills} drills: '
        f'{predicted["tokens"]:,.0f} tokens, at least {predicted["minutes"]:.0f} min of training',
        flush=True)
  # Played anew by a run that goes on: that is faster than to keep and read them.
  examples = []
  rules = dataset.Rules(drop_memory=False, loss_on=config.loss_on)
  for episode in tqdm.tqdm(
      lessons.play(tokenizer, 'train', config.episodes), total=config.episodes, unit='episode',
      desc='expert', file=sys.stderr):
    examples.append(dataset.make_example(episode, rules))
  shortest = min(len(example.tokens) for example in examples)
  if shortest > config.row_len:
    raise errors.UserError(
      f'No episode fits into row_len={config.row_len}; the shortest has {shortest} tokens.')
  examples += [drill(tokenizer, config.seed, i, config.agent) for i in range(config.drills)]
  examples += [
    search_drill(tokenizer, config.seed, i, config.agent) for i in range(config.search_drills)]
  rows = packing.pack(examples, config.row_len)
  if rows.too_long:
    print(f'{len(rows.too_long)} episodes are longer than row_len={config.row_len} and left out.',
          file=sys.stderr)

  import jax

  from models import decoder, weights

  mesh = train.choose_mesh(config.mesh, config.batch_rows, config.row_len, architecture)
  if params:
    model = decoder.from_params(architecture, params, mesh=mesh)
  else:
    model = initial_model(architecture, config.seed, mesh)
  num_params = sum(leaf.size for leaf in jax.tree.leaves(model.lora))
  print(f'{num_params / 1e6:.2f} million parameters, {tokenizer.vocab_size} tokens in the '
        'vocabulary', file=sys.stderr)
  state, record = train.fit(config, workdir, model, rows, mesh)

  # The folder, and how well it reads where a hint tells the rule and where it has to find it.
  held_out = {
    name: reply_accuracy(model, state, list(lessons.play(
      tokenizer, None, config.held_out_episodes, hint_share=share, rule_share=share)))
    for name, share in (('told', 1.0), ('untold', 0.0))}
  folder = workdir / MODEL_FOLDER
  weights.export_pretrained(
    folder, architecture, jax.device_get(decoder.to_params(state.lora)))
  copy_tokenizer(workdir / 'tokenizer', folder)
  record |= {
    'parameters': num_params,
    'vocabulary': tokenizer.vocab_size,
    'episodes': config.episodes,
    'drills': config.drills,
    'search_drills': config.search_drills,
    'start_decoder': config.start_decoder,
    'too_long': len(rows.too_long),
    'held_out': held_out,
    'predicted': predicted,
    'wall_s': time.perf_counter() - started,
    'versions': summary.versions(),
  }
  workdir_lib.write_json(summary_path, record)
  return record


def main(_):
  record = run(flags.FLAGS.config, flags.FLAGS.workdir)
  told, untold = record['held_out']['told'], record['held_out']['untold']
  print(
    f'{record["parameters"] / 1e6:.2f} million parameters, {record["tokens"]} tokens, loss '
    f'{record["loss"]:.4f}, {record["wall_s"] / 60:.1f} min\n'
    f'held-out replies right: {told["replies"]:.1%} where a hint tells the rule (the rule itself '
    f'{told["rule"]:.1%}), {untold["replies"]:.1%} without hints (the rule {untold["rule"]:.1%})\n'
    f'model={pathlib.Path(flags.FLAGS.workdir) / MODEL_FOLDER}')


if __name__ == '__main__':
  cli.define_config_flags()
  cli.run(main)
