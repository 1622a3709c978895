"""The pages of an experience retrieval: one a split, since the rows of one play the same games."""

import collections
import pathlib
from typing import Any

import numpy as np

from data import trajectory
from experiments import experience_rows, report
from retrieval import experience as experience_lib

_TRAININGS = ('lora', 'exprag_lora', 'exprag_lora_dropout', 'distilled')


def pages(workdir: pathlib.Path, summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
  """File name -> what `report_page.render` draws.

  Args:
    workdir: of a finished run.
    summary: its summary.json.

  Raises:
    errors.UserError: the run is damaged.
  """
  config = report.read_json(workdir / 'config.json')
  tokenizer, problem = report.load_tokenizer(config)
  return {
    f'report-{split}.html': _gather(workdir, summary, config, split, tokenizer, problem)
    for split in experience_rows.SPLITS
    if any(row['tasks'] == split for row in summary['rows'])}


def _gather(workdir, summary, config, split, tokenizer, problem) -> dict[str, Any]:
  prefix = f'{split}/'
  short = lambda name: name.removeprefix(prefix)
  rows = [{**row, 'id': short(row['id'])} for row in summary['rows'] if row['tasks'] == split]
  paired = [{**pair, 'a': short(pair['a']), 'b': short(pair['b'])}
            for pair in summary['paired'] if pair['a'].startswith(prefix)]
  own = {**summary, 'rows': rows, 'paired': paired}
  played = report.load_evaluations(workdir / 'evaluation' / split, own)
  episodes = {name: list(tasks.values()) for name, tasks in played.items()}
  if tokenizer and next(iter(episodes.values()))[0].tokenizer != tokenizer.fingerprint:
    problem = 'the tokenizer found is not the one that the episodes were played with'
  own['paired'] = report.paired_with_counts(own, played)
  teacher = f'{config.get("teacher", "")}+matched'
  student = next((name for name in ('distilled', 'lora') if name in played), '')
  banks = {
    path.parent.name: experience_lib.ExperienceBank.load(path).provenance
    for path in sorted((workdir / 'index').glob('*/bank'))}
  same = {row['id']: row.get('same_kind_retrieved') for row in rows}
  return {
    'title': f'Experience retrieval, {split} tasks',
    'summary': own,
    'config': config,
    'tokens': {name: report.token_means(found) for name, found in episodes.items()},
    'solved': {name: report.solved_by_call(found) for name, found in episodes.items()},
    'trainings': {
      name: report.read_metrics(workdir / name) for name in _TRAININGS
      if (workdir / name / 'done.json').exists()},
    'terminations': [
      (f'evaluation: {name}', name, collections.Counter(e.termination for e in found))
      for name, found in episodes.items()],
    'banks': banks,
    'retrieved': [
      (name, *_means(found), same[name]) for name, found in episodes.items()
      if any(e.retrieved for e in found)],
    'reader': report.reader_data(
      played, {}, tokenizer, teacher=teacher, student=student, base='frozen',
      memory='experiences'),
    'prompt_problem': problem,
  }


def _means(episodes: list[trajectory.Episode]) -> tuple[float, float]:
  """Experiences in the first block of an episode, and their similarity."""
  first = [[r for r in e.retrieved if not r.get('step')] for e in episodes]
  scores = [float(r['score']) for found in first for r in found]
  return float(np.mean([len(found) for found in first])), float(np.mean(scores or [np.nan]))
