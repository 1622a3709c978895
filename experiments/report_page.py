"""The report's page: its sections as HTML, and one file made of them.

Everything that comes from a run is hostile: an environment, a model or a hint writer may say
'</script>'. Text in tables is escaped here; the episodes go into the page as JSON without '<', '>'
and '&', and report.js puts them into text nodes only. Should something slip through all the same,
the page's Content-Security-Policy lets no script run but that one and nothing be loaded.
"""

import base64
import hashlib
import html
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from data import trajectory
from experiments import report_charts as charts
from retrieval import hints as hints_lib

_ASSETS = pathlib.Path(__file__).parent
_TRAINING_TITLES = {
  'warm_start': 'Warm start: expert episodes of other skills',
  'sft': 'sft: on what base solved',
  'distilled': 'distilled: on what the teacher solved, its memory removed',
  'lora': 'lora: demonstrations without a memory',
  'exprag_lora': 'exprag_lora: demonstrations with a memory',
  'exprag_lora_dropout': 'exprag_lora_dropout: likewise, with retrieval dropout',
}
_POLICY_NOTES = {
  'base': 'no hints',
  'base+hints': 'teacher: hints in the prompt',
  'sft': 'student of base',
  'distilled': 'student of the teacher',
  'frozen': 'the model as it is',
  'lora': 'trained without a memory',
  'exprag_lora': 'trained with a memory; index empty',
  'exprag_lora_dropout': 'trained with retrieval dropout; index empty',
}
_MEMORY_NOTES = {
  'hints': 'with retrieved hints', 'random': 'control: random {memory}',
  'fixed': 'control: fixed hints', 'matched': 'with the index of its own split',
  'mismatched': "with the other split's index", 'all': 'with both indexes in one',
  'growing': 'with an index that grew meanwhile',
}
ENDINGS = {
  'success': 'solved',
  'failure': 'the game was lost',
  'step_limit': 'out of environment steps',
  'call_limit': 'out of model calls',
  'repetition': 'went in circles',
  'context_overflow': 'context was full',
  'env_error': 'environment broke',
}


def escape(value: Any) -> str:
  """Any value as HTML text that is also safe inside a quoted attribute."""
  return html.escape(str(value), quote=True)


def embedded_json(record: Any) -> str:
  """JSON that can stand in a script element: nothing in it can end the element or be markup.

  Numbers that are not finite become null, since JSON has none.
  """
  def clean(value):
    if isinstance(value, float) and not math.isfinite(value):
      return None
    if isinstance(value, dict):
      return {k: clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
      return [clean(v) for v in value]
    return value

  # ASCII only, so U+2028 and lone surrogates are escapes too.
  text = json.dumps(clean(record), ensure_ascii=True, allow_nan=False, separators=(',', ':'))
  return text.replace('&', '\\u0026').replace('<', '\\u003c').replace('>', '\\u003e')


def _percent(value: float) -> str:
  return f'{100 * value:.1f}'


def _range(interval: Sequence[float], sign: bool = False) -> str:
  low, high = (_points(x) if sign else _percent(x) for x in interval)
  return f'{low} to {high}'


def _points(value: float) -> str:
  """A difference in points with its sign, a real minus; never -0.0."""
  return f'{100 * value:+.1f}'.replace('-0.0', '+0.0').replace('-', '−')


def significant(pair: dict[str, Any]) -> bool:
  """Whether the 95 % interval of a paired difference leaves zero out."""
  low, high = pair['ci95']
  return low > 0 or high < 0


def _cell(content: str, css: str = 'number') -> str:
  return f'<td class="{css}">{content}</td>'


def _policy(name: str, looks: charts.Looks) -> str:
  return f'<span class="policy">{looks.swatch(name)}<b>{escape(name)}</b></span>'


def policy_note(name: str, memory_name: str = 'hints') -> str:
  """What a row of the evaluation is, in some words: POLICY, POLICY+MEMORY or POLICY+MEMORY@K."""
  if name in _POLICY_NOTES:
    return _POLICY_NOTES[name]
  memory, _, k = name.partition('+')[2].partition('@')
  note = _MEMORY_NOTES.get(memory, f'with {memory}' if memory else '')
  note = note.replace('{memory}', memory_name)
  if memory.endswith('-hints'):
    note = f'hints of the writer {memory.removesuffix("-hints")}'
  return f'{note}, k = {k}' if k else note


def scrolling(table: str, label: str) -> str:
  """A table that is wider than a telephone scrolls in a box of its own, by keys too."""
  return (f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
          f'{table}</div>')


def lead(run: dict[str, Any]) -> str:
  """The result in sentences, made from the numbers and their intervals only."""
  rows = {row['id']: row for row in run['summary']['rows']}
  pairs = {(p['a'], p['b']): p for p in run['summary']['paired']}
  student = rows.get('distilled')
  if student is None or run['reader']['memory'] != 'hints':
    best = max(rows.values(), key=lambda row: row['success_rate'])
    return (f'<p class="lead">Of {best["n"]} unseen games {escape(best["id"])} solves the most, '
            f'<b>{_percent(best["success_rate"])} %</b>.</p>')
  others = [
    f'{name} {_percent(rows[key]["success_rate"])} %'
    for key, name in (('base+hints', 'its teacher, hints in the prompt,'),
                      ('base', 'the base policy'), ('sft', 'the student of base')) if key in rows]
  text = '; '.join([
    f'Without any hint in its prompt the distilled student solves '
    f'<b>{_percent(student["success_rate"])} %</b> of {student["n"]} unseen games', *others]) + '.'
  for other, name in (('base', 'the base policy'), ('base+hints', 'its teacher')):
    pair = pairs.get(('distilled', other))
    if pair:
      verdict = 'significant' if significant(pair) else 'not significant'
      text += (f' Against {name} that is {_points(pair["difference"])} points '
               f'(95 % interval {_range(pair["ci95"], True)}), {verdict}.')
  ours, theirs = (
    run['tokens'].get(name, {'billed': [0]})['billed'][0] for name in ('distilled', 'base+hints'))
  if theirs > 0:
    share = 100 * (ours / theirs - 1)
    text += (f' An episode of the student takes {ours:,.0f} tokens, {abs(share):.0f} % '
             f'{"fewer" if share < 0 else "more"} than the teacher&#39;s {theirs:,.0f}.')
  return f'<p class="lead">{text}</p>'


def results(run: dict[str, Any]) -> str:
  """The table of the policies and the table of paired differences."""
  looks, body = run['looks'], []
  for row in run['summary']['rows']:
    low, high = row['success_ci95']
    memory = row.get('memory_tokens_mean')
    note = policy_note(row['id'], run['reader']['memory'])
    cells = [
      f'<th scope="row">{_policy(row["id"], looks)}<small>{escape(note)}</small></th>',
      _cell(f'{charts.interval(low, row["success_rate"], high, row["id"], looks)}'
            f'<span><b>{_percent(row["success_rate"])} %</b> '
            f'<small>{_range(row["success_ci95"])}</small></span>', 'number wide')]
    for value, digits in (
        (row['env_steps_mean'], 1), (row['model_calls_mean'], 1), (row['prompt_tokens_mean'], 0),
        (memory, 0), (row['prefilled_tokens_mean'], 0), (row['generated_tokens_mean'], 0),
        (row.get('invalid_actions_mean'), 1)):
      cells.append(_cell('–' if value is None else f'{value:,.{digits}f}'))
    body.append(f'<tr>{"".join(cells)}</tr>')
  titles = ('policy', 'solved, 95 % interval', 'env steps', 'model calls', 'prompt tokens',
            'memory tokens', 'computed tokens', 'generated', 'invalid actions')
  pairs = []
  reach = max((abs(x) for p in run['summary']['paired'] for x in p['ci95']), default=0) or 1
  for pair in run['summary']['paired']:
    low, high = pair['ci95']
    verdict = ('<span class="tag yes">significant</span>' if significant(pair)
               else '<span class="tag">not significant</span>')
    pairs.append(
      f'<tr><th scope="row"><span class="term">{_policy(pair["a"], looks)}</span> '
      f'<span class="term"><i>−</i>{_policy(pair["b"], looks)}</span></th>'
      + _cell(f'{charts.interval(low, pair["difference"], high, pair["a"], looks, reach)}'
              f'<span><b>{_points(pair["difference"])}</b> <small>{_range(pair["ci95"], True)}'
              '</small></span>', 'number wide')
      + _cell(verdict, 'text')
      + _cell(f'{pair["only_a"]}')
      + _cell(f'{pair["only_b"]}') + '</tr>')
  return (
    '<section id="results"><h2>Results</h2>'
    f'{_table("Results", titles, body)}'
    '<p class="note">Means per episode. <i>Prompt tokens</i> count the whole prompt of every call, '
    'what an API would bill; <i>computed tokens</i> are those that the engine really processed, '
    'for it keeps a conversation&#39;s KV cache. Intervals of success are Wilson&#39;s.</p>'
    '<h3>Paired differences on the same games</h3>'
    + _table('Paired differences', ('difference', 'points, 95 % interval', 'verdict',
                                    'solved by the first only', 'by the second only'), pairs)
    + '<p class="note">In points of success rate; bootstrap over games. A difference is called '
    'significant where its interval leaves zero out.</p></section>')


def _table(label: str, titles: Sequence[str], rows: Sequence[str]) -> str:
  head = ''.join(f'<th scope="col">{t}</th>' for t in titles)
  return scrolling(
    f'<table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>', label)


def _figure(svg: str, caption: str) -> str:
  return f'<figure>{svg}<figcaption>{caption}</figcaption></figure>'


def cost(run: dict[str, Any]) -> str:
  """Success against what it costs."""
  rows, tokens = run['summary']['rows'], run['tokens']
  billed, computed = (
    charts.success_against_tokens(
      rows, {name: t[key] for name, t in tokens.items()}, f'{key} tokens per episode',
      run['looks'])
    for key in ('billed', 'computed'))
  return (
    '<section id="cost"><h2>Success against cost</h2><div class="figures">'
    + _figure(billed, 'Prompt and generated tokens as an API bills them: the prompt again at every '
                      'call. Bars are 95 % intervals, in both directions.')
    + _figure(computed, 'The same with the KV cache kept: tokens that were really processed, and '
                        'those generated.')
    + _figure(charts.solved_by_call(run['solved'], run['looks']),
              'How fast: games solved within a number of model calls.')
    + '</div></section>')


def training(run: dict[str, Any]) -> str:
  """One learning curve per training."""
  figures, smoothed = [], False
  # The students have one scale, so that their losses can be compared.
  students = [r['loss'] for name, records in run['trainings'].items() if name != 'warm_start'
              for r in records if math.isfinite(r['loss'])]
  for name, records in run['trainings'].items():
    title = _TRAINING_TITLES[name]
    if not records:
      figures.append(_figure('', f'<b>{title}</b><br>Nothing to train on: no step was taken.'))
      continue
    smoothed |= len(records) >= charts.SMOOTH_FROM
    figures.append(_figure(
      charts.learning_curve(
        records, run['looks'].css(name), f'Learning curve of {name}',
        max(students, default=None) if name != 'warm_start' else None),
      f'<b>{title}</b><br>{records[-1]["step"]} steps, last loss {records[-1]["loss"]:.3f}'))
  note = ('<p class="note">Loss and accuracy are of the tokens that are trained on. Both students '
          'have one scale'
          + ('; strong lines are running means, the pale ones single records' if smoothed else '')
          + '.</p>')
  return (f'<section id="training"><h2>Learning curves</h2><div class="figures">'
          f'{"".join(figures)}</div>{note}</section>')


def terminations(run: dict[str, Any]) -> str:
  """How the episodes of every run ended."""
  groups = run['terminations']
  order = [t for t in trajectory.TERMINATIONS if any(counts.get(t) for _, _, counts in groups)]
  rows = []
  for label, policy, counts in groups:
    kind, _, name = label.partition(': ')
    cells = ''.join(
      _cell(f'{counts.get(t, 0)}') for t in order)
    rows.append(
      f'<tr><th scope="row"><span class="policy">{run["looks"].swatch(policy)}'
      f'<b>{escape(name)}</b></span>'
      f'<small>{escape(kind)}</small></th>'
      f'<td class="wide">{charts.shares(counts, order)}</td>{cells}</tr>')
  keys = (f'<span class="key t-{t}"></span>{ENDINGS[t]}' for t in order)
  titles = ('episodes of', 'share', *keys)
  return ('<section id="endings"><h2>How episodes ended</h2>'
          f'{_table("How episodes ended", titles, rows)}</section>')


def _hint(number: int, hint: hints_lib.Hint, uses: dict[str, list[int]], most: int) -> str:
  shown, won = uses.get(hint.id, (0, 0))
  outcome = f'{won} of {shown} solved' if shown else 'never retrieved'
  sources = ''.join(f'<li>{escape(s["task_id"])}</li>' for s in hint.sources)
  bar = _n_bar(hint.count / most)
  return (
    f'<li id="hint-{number}"><div class="hint-text">{escape(hint.text)}</div>'
    f'<div class="hint-facts"><span class="hint-count">{bar} taught by {hint.count} '
    f'failure{"" if hint.count == 1 else "s"}</span><span>{outcome}</span>'
    f'<details><summary>sources</summary><ul>{sources}</ul><p>id {escape(hint.id)}, writer '
    f'{escape(hint.writer)}</p></details></div></li>')


def _n_bar(share: float) -> str:
  return (f'<svg class="count" viewBox="0 0 60 8" aria-hidden="true"><rect x="0" y="0" '
          f'width="{60 * share:.1f}" height="8"/></svg>')


def bank(run: dict[str, Any]) -> str:
  """The hint bank: how failures became hints, and every hint with what it was good for."""
  found, provenance = run['bank'], run['bank'].provenance
  writer = provenance.get('writer', {})
  writer = writer if isinstance(writer, dict) else {'name': writer}
  stages = (
    ('episodes', provenance.get('episodes')), ('failures', provenance.get('failures')),
    ('texts written', provenance.get('written')),
    ('near-duplicates merged', provenance.get('merged')), ('hints in the bank', len(found.hints)))
  funnel = ''.join(
    f'<li><b>{"–" if value is None else escape(value)}</b> {label}</li>'
    for label, value in stages)
  facts = {
    'written by': ', '.join(f'{v}' if k == 'name' else f'{k}: {v}' for k, v in writer.items()),
    'from episodes of': ', '.join(map(str, provenance.get('policies', []))),
    'model': ', '.join(map(str, provenance.get('models', []))),
    'runs': ', '.join(map(str, provenance.get('runs', []))),
    'failures without a hint': provenance.get('failures_without_hints', '–'),
    'fingerprint': found.fingerprint[:16],
  }
  listed = ''.join(f'<dt>{k}</dt><dd>{escape(v)}</dd>' for k, v in facts.items())
  most = max((hint.count for hint in found.hints), default=1) or 1
  groups = []
  for task_type in found.task_types:
    hints = ''.join(
      _hint(i, hint, run['uses'], most) for i, hint in enumerate(found.hints)
      if hint.task_type == task_type)
    groups.append(f'<h3>{escape(task_type)}</h3><ol class="hints">{hints}</ol>')
  return (
    f'<section id="bank"><h2>The hint bank</h2><ol class="funnel">{funnel}</ol>'
    f'<dl class="facts">{listed}</dl>'
    '<p class="note">The outcome beside a hint counts the teacher&#39;s training and evaluation '
    'episodes that had it in their prompt; hints come in groups, so it is no effect of one hint.'
    '</p><label class="filter">Find <input id="hint-filter" type="search" '
    'placeholder="words of a hint" autocomplete="off"></label>'
    '<div class="hint-groups" tabindex="0" role="region" aria-label="Hints">'
    f'{"".join(groups) or "<p>No failure taught a hint.</p>"}</div>'
    '</section>')


def experiences(run: dict[str, Any]) -> str:
  """The banks of experiences: what each was made from, and what was retrieved for it."""
  rows = []
  for name, provenance in run['banks'].items():
    for source in provenance.get('sources', []):
      cells = (source.get('run', ''), source.get('policy', ''))
      rows.append(
        f'<tr><th scope="row">{escape(name)}</th>'
        + ''.join(_cell(escape(cell), 'text') for cell in cells)
        + ''.join(_cell(escape(source.get(key, 0)))
                  for key in ('successes', 'failures', 'left_out')) + '</tr>')
  retrieved = [
    f'<tr><th scope="row">{_policy(name, run["looks"])}</th>{_cell(f"{experiences:,.2f}")}'
    f'{_cell(f"{score:.3f}")}{_cell("–" if same is None else f"{_percent(same)} %")}</tr>'
    for name, experiences, score, same in run['retrieved']]
  return (
    '<section id="bank"><h2>The experience banks</h2>'
    + _table('Banks', ('index', 'run', 'played by', 'successes', 'failures', 'left out'), rows)
    + '<h3>What was retrieved</h3>'
    + _table('Retrieved', ('policy', 'experiences an episode', 'mean similarity',
                           'with a success at the same kind of task'), retrieved)
    + '<p class="note">What was played on a task itself is never retrieved for it.</p></section>')


def reader(run: dict[str, Any]) -> str:
  """The frame of the episode reader, which report.js fills."""
  problem = run['prompt_problem']
  legend = ' '.join(
    f'<span>{run["looks"].swatch(name)}{escape(name)}</span>' for name in run['reader']['policies'])
  note = (f'<p class="note">Prompts are not shown: {escape(problem.rstrip("."))}.</p>'
          if problem else '')
  return (
    '<section id="reader"><h2>Episodes</h2><p class="note">One column is one game, one square one '
    'policy, filled where it solved the game. Choose a game to read what the policies did on it. '
    '<span class="keys">Keys: <kbd>←</kbd> <kbd>→</kbd> another game, <kbd>↑</kbd> <kbd>↓</kbd> '
    'step by step, <kbd>Tab</kbd> to the next column.</span></p>'
    f'{note}<noscript><p class="note">The episode reader needs JavaScript.</p></noscript>'
    '<div class="reader-bar"><label>Show <select id="game-filter"></select></label>'
    '<label class="grow">Game <select id="game-choice"></select></label>'
    '<span class="buttons"><button id="game-before" type="button">previous</button>'
    '<button id="game-next" type="button">next</button></span></div>'
    f'<p class="map-legend">from top to bottom: {legend}</p>'
    '<div id="game-map" role="group" aria-label="All games"></div>'
    '<div id="game-head"></div>'
    '<div id="policy-columns" role="group" aria-label="Policies side by side"></div>'
    '<div id="policy-tabs" role="tablist" aria-label="Policies"></div>'
    '<div id="episodes"></div></section>')


def about(run: dict[str, Any]) -> str:
  """Config, versions and time of the run."""
  def rows(record):
    return ''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in record.items())

  summary = run['summary']
  wall = {k: f'{v:,.0f} s' for k, v in summary.get('wall_s', {}).items()}
  total = sum(summary.get('wall_s', {}).values()) / 60
  return (
    f'<section id="about"><h2>The run</h2><details><summary>Time: {total:.1f} minutes</summary>'
    f'<dl class="facts">{rows(wall)}</dl></details>'
    f'<details><summary>Config</summary><dl class="facts">{rows(run["config"])}</dl></details>'
    f'<details><summary>Versions</summary><dl class="facts">{rows(summary.get("versions", {}))}'
    '</dl></details></section>')


def _hash(text: str) -> str:
  return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def render(run: dict[str, Any]) -> str:
  """The whole page.

  Args:
    run: what `report.gather` returns.
  """
  style = (_ASSETS / 'report.css').read_text(encoding='utf-8')
  script = (_ASSETS / 'report.js').read_text(encoding='utf-8')
  policy = (f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
            "img-src data:; base-uri 'none'; form-action 'none'")
  config, first = run['config'], run['summary']['rows'][0]
  looks = charts.Looks([row['id'] for row in run['summary']['rows']])
  run = {**run, 'looks': looks}
  memory, title = run['reader']['memory'], run.get('title', 'Hint distillation')
  k = config.get('k' if memory == 'hints' else 'experience_k')
  facts = [config.get('model'), config.get('env'), f'agent {config.get("agent")}',
           f'{first["n"]} games of {first.get("split")}', f'k = {k} {memory}',
           f'seed {first.get("seed")}']
  warning = (
    '<p class="warning">A dry run: a tiny random model walked through every stage, and the numbers '
    'mean nothing.</p>' if config.get('dry_run') else '')
  links = ''.join(
    f'<a href="#{name}">{label}</a>' for name, label in (
      ('results', 'Results'), ('cost', 'Cost'), ('training', 'Training'), ('endings', 'Endings'),
      ('bank', memory.capitalize()), ('reader', 'Episodes'), ('about', 'The run')))
  body = ''.join(part(run) for part in (
    results, cost, training, terminations, bank if memory == 'hints' else experiences, reader,
    about))
  record = embedded_json({
    **run['reader'], 'endings': ENDINGS,
    'looks': [looks.css(policy) for policy in run['reader']['policies']]})
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
    '<link rel="icon" href="data:,">'
    f'<title>{escape(title)}: {escape(config.get("model"))}</title>'
    f'<style>{style}</style></head><body>'
    f'<header><h1>{escape(title)}</h1><p class="facts-line">'
    f'{" · ".join(escape(fact) for fact in facts)}</p>{warning}{lead(run)}<nav>{links}</nav>'
    f'</header><main>{body}</main>'
    f'<script type="application/json" id="data">{record}</script>'
    f'<script>{script}</script></body></html>\n')
