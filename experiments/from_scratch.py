"""A small decoder trained from random weights, as the base of an experiment.

  python -m experiments.from_scratch --config=configs/from_scratch.py --workdir=runs/scratch
  python -m experiments.hint_distillation \
    --config=configs/hint_distillation.py:model=runs/scratch/small_decoder,... --workdir=runs/small

An experiment whose key `decoder` names a setting of configs/from_scratch.py does the first itself.

It learns to act and to read hints from expert episodes alone, in houses that draw anew which of the
game's words their states have, and from drills (experiments/lessons.py): a word says nothing about
what it takes, so that a hint or a label helps only a model that looks it up. That is what carries
over to the loop's skills, whose rules it never saw.
In another environment it learns from the expert's episodes as they are, in a catalogue of its own
where the environment generates one; WebShop's shopper forgets, in some categories, what no hint
reminds it of.

The run's folder holds tokenizer/ (byte-level BPE, trained here), checkpoints/, metrics.jsonl,
summary.json and small_decoder/, a Hugging Face folder.
"""

import dataclasses
import json
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Sequence

import numpy as np
import tqdm
from absl import flags

import train
from configs import cli
from data import bpe, errors, summary, trajectory
from data import workdir as workdir_lib
from data.tokenizer import Tokenizer
from envs import household, household_expert
from experiments import lessons as lessons_lib
from retrieval import experience as experience_lib
from training import dataset, packing

_SAMPLED_LESSONS = 40  # of which the cost is predicted

# Also the model's name in the record of what it plays.
MODEL_FOLDER = 'small_decoder'


def make_tokenizer(
  lessons: lessons_lib.Lessons, vocab_size: int, count: int, folder: pathlib.Path
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

  With embeddings and kernels of 0.02, as GPT-2 has them, a small decoder learned to spell a word
  that it had read, and in one of two runs of 13 million tokens which of several things is meant;
  from here it does after 4 million.
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
    up there (what follows may repeat it); 'label': the same for those to a label; 'goal_label': to
    one that tells the goal's state, which has to be seen.
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
  right, rule, label, goal_label = [], [], [], []
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
    wanted = household_expert.parse_goal(episode.instruction)[1].get('state')
    for after, step in zip(found[1:], episode.steps, strict=False):
      if household.LABEL in step.observation:
        label.append(after)
        if step.observation.endswith(f' to make them {wanted}.'):
          goal_label.append(after)
  return {name: float(np.mean(values or [0.0])) for name, values in (
    ('replies', right), ('rule', rule), ('label', label), ('goal_label', goal_label))}


def drill_counts(config) -> dict[str, int]:
  """How many drills of each kind a run learns from."""
  return {name: config[name] for name in lessons_lib.DRILLS}


def predict(
  config, lessons: lessons_lib.Lessons, tokenizer: Tokenizer, architecture
) -> dict[str, float]:
  """What the run will cost on this machine, from a few lessons.

  Returns:
    'tokens': trained ones; 'minutes': of the training, the lessons' own not counted.
  """
  from models import cost
  from training import speed

  own = [len(e.tokens) for e in lessons.play(
    tokenizer, 'train', min(_SAMPLED_LESSONS, config.episodes))]
  tokens = config.episodes * np.mean(own)
  for name, count in drill_counts(config).items():
    make = lessons_lib.DRILLS[name]
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
  drills = drill_counts(config)
  if min(config.episodes, config.tokenizer_episodes, config.held_out_episodes) < 1 or (
      min(drills.values()) < 0):
    raise errors.UserError(
      'episodes, tokenizer_episodes and held_out_episodes must be at least 1, '
      f'{", ".join(drills)} at least 0.')
  experience_lib.get_format(config.experience_format)
  if (asked := [name for name in drills if drills[name]]) and config.env != 'household':
    raise errors.UserError(
      f'drills are about houses; set {", ".join(f"{name}=0" for name in asked)} with '
      f'env={config.env}.')
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

  lessons = lessons_lib.Lessons(config)
  params = None
  if config.start_decoder:
    architecture, params = start_from(config, workdir / 'tokenizer')
    tokenizer = Tokenizer.load(workdir / 'tokenizer')
  else:
    tokenizer = make_tokenizer(
      lessons, config.vocab_size, config.tokenizer_episodes, workdir / 'tokenizer')
    architecture = make_config(config, tokenizer.vocab_size)
  predicted = predict(config, lessons, tokenizer, architecture)
  drills = drill_counts(config)
  print(f'{config.episodes} lessons and {sum(drills.values())} drills: '
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
  for name, count in drills.items():
    examples += [lessons_lib.DRILLS[name](tokenizer, config.seed, i, config.agent)
                 for i in range(count)]
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
    **drills,
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
