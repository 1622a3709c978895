"""What an experiment will cost, said before it starts: tokens and minutes by part.

Episode lengths come from a few episodes of the scripted expert in the run's own format and tasks,
once as one who has to find out and once as one who was told; minutes from one timed product.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

import rollout
from agents import expert_episodes
from agents import policy as policy_lib
from agents.episode import Labels
from configs import rollout as rollout_config
from data import trajectory
from envs import base as envs_base
from experiments import evaluation_rows
from models import cost
from models import lora as lora_lib
from models.registry import count_params
from retrieval import experience as experience_lib
from training import speed

_GAMES = 6

# Share of the machine's product rate that playing reaches, counting two operations a parameter and
# token: SmolLM2 on 2 CPU cores plays 800 to 900 tokens a second, prefilled and generated.
_PLAY_EFFICIENCY = 0.25

# A model makes more steps than the expert that knows, and wins part of its games.
MODEL_STEPS = 1.5
_KEPT_SHARE = 0.7


def predict(config: Any, base: policy_lib.Base,
            rows: Sequence[evaluation_rows.Row]) -> list[dict[str, Any]]:
  """The parts of a run with their tokens and minutes on this machine.

  Args:
    config: as configs/hint_distillation.py makes it, its dtypes settled.
    base: the model.
    rows: of the evaluation; a student that none of them names is not trained.

  Returns:
    A list of {'part', 'episodes', 'tokens', 'minutes'}. `tokens` are computed ones: prefilled and
    generated in play, trained places times epochs in training. Compilation is not in the minutes.
  """
  finding = _expert_tokens(config, base, known=False)
  told = _expert_tokens(config, base, known=True)
  kept = round(_KEPT_SHARE * config.train_games)
  costs = Costs(config, base)
  if config.warm_episodes:
    costs.train('warm start', config.warm_episodes, finding, config.warm_epochs)
  costs.play('base and teacher', 2 * config.train_games, MODEL_STEPS * told)
  students = {row.policy for row in rows} - {'base'}
  costs.train('students', len(students) * kept, told, config.epochs)
  costs.play('evaluation', len(rows) * config.eval_games, MODEL_STEPS * told)
  return costs.parts


class Costs:
  """Adds up parts of a run on this machine.

  Attributes:
    parts: dicts of 'part', 'episodes', 'tokens' and 'minutes'.
  """

  def __init__(self, config: Any, base: policy_lib.Base):
    """Times one product.

    Args:
      config: has rank, alpha, row_len, and settled dtype and play_dtype.
      base: the model.
    """
    self.parts: list[dict[str, Any]] = []
    self._config, self._base = config, base
    self._rate = speed.product_rate(config.dtype)
    # Where a CPU's own kernels play bfloat16 without instructions for it, they multiply float32.
    self._play_rate = max(self._rate, speed.product_rate(config.play_dtype))
    self._params = count_params(base.config)
    self._lora = lora_lib.LoraConfig(rank=config.rank, alpha=config.alpha)

  def play(self, part: str, episodes: int, mean: float) -> None:
    """Episodes of `mean` computed tokens each."""
    tokens = round(episodes * mean)
    minutes = 2 * self._params * tokens / (self._play_rate * _PLAY_EFFICIENCY) / 60
    self._add(part, episodes, tokens, minutes)

  def train(self, part: str, episodes: int, mean: float, epochs: float) -> None:
    """Passes over episodes of `mean` tokens each."""
    tokens = round(episodes * mean * epochs)
    flops = cost.train_flops(
      self._base.config, self._lora, tokens, tokens // 4, self._config.row_len)
    self._add(part, episodes, tokens, flops / (self._rate * speed.STEP_EFFICIENCY) / 60)

  def _add(self, part: str, episodes: int, tokens: int, minutes: float) -> None:
    self.parts.append({'part': part, 'episodes': episodes, 'tokens': tokens, 'minutes': minutes})


def _expert_tokens(config: Any, base: policy_lib.Base, *, known: bool) -> float:
  """Mean tokens of the expert's episodes on the first training games."""
  episodes = _expert_episodes(config, base, known=known, skills=config.loop_skills)
  return float(np.mean([len(e.tokens) for e in episodes]))


def experience_tokens(config: Any, base: policy_lib.Base, **tasks: Any) -> tuple[float, float]:
  """Mean tokens of the expert's episodes without a memory, and of one as an experience.

  Args:
    config: as configs/experience_retrieval.py makes it.
    base: the model.
    **tasks: the keys of configs/rollout.py that choose the tasks.
  """
  episodes = _expert_episodes(config, base, known=True, **tasks)
  render = experience_lib.get_format(config.experience_format)
  rendered = [
    len(base.tokenizer.encode(render(experience_lib.from_episode(e, base.tokenizer, ''))))
    for e in episodes]
  return float(np.mean([len(e.tokens) for e in episodes])), float(np.mean(rendered))


def _expert_episodes(
  config: Any, base: policy_lib.Base, *, known: bool, **tasks: Any
) -> list[trajectory.Episode]:
  """The expert's episodes on the first training games, in the format of the run."""
  values = {key: config[key] for key in rollout_config.DEFAULTS if key in config}
  values.update(env_seed=config.seed, episodes=_GAMES, agent='expert', expert_format=config.agent)
  values.update(tasks)
  rollout_values = rollout_config.make(values)
  suite = rollout.make_suite(rollout_values)
  spec = expert_episodes.expert_spec(rollout.make_spec(rollout_values))
  labels = Labels('expert', 'expert', config.train_split, config.seed)
  return [
    expert_episodes.expert_episode(
      suite, task, base.tokenizer, spec, labels,
      known_rules=envs_base.rules_of(suite, task) if known else ())
    for task in rollout.choose_tasks(suite, config.train_split, _GAMES)]


def table(parts: list[dict[str, Any]]) -> str:
  """The parts as text for a terminal, with their sum."""
  lines = [f'{"predicted":<18} {"episodes":>8} {"tokens":>9} {"minutes":>8}']
  total = {'part': 'all', **{key: sum(p[key] for p in parts)
                             for key in ('episodes', 'tokens', 'minutes')}}
  for part in [*parts, total]:
    lines.append(f'{part["part"]:<18} {part["episodes"]:>8} {part["tokens"]:>9} '
                 f'{part["minutes"]:>8.1f}')
  return '\n'.join(lines)
