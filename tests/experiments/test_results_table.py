"""The pages' numbers are the committed results, and merging seeds is right."""

import json

import numpy as np
import pytest

from experiments import results_table


def test_the_pages_show_the_committed_results():
  for path, text in results_table.pages().items():
    assert text == path.read_text(), f'{path}: python -m experiments.results_table'


def test_the_table_says_what_is_not_significant():
  pair = {'a': 'x', 'b': 'y', 'difference': 0.1, 'ci95': [-0.1, 0.3], 'n': 9}
  assert results_table.pair_line(pair) == (
    '- x - y: +10.0 points, 95 % interval -10.0 to +30.0 (not significant)')
  assert 'not significant' not in results_table.pair_line({**pair, 'ci95': [0.01, 0.3]})


def test_a_page_without_markers_is_refused():
  with pytest.raises(ValueError, match='lacks'):
    results_table.insert('# Title', 'table')


def _record(seed, base, distilled):
  rows = [{'id': id_, 'n': len(won), 'seed': seed, 'env_steps_mean': 4.0 + seed,
           'prompt_tokens_mean': 1.0, 'prefilled_tokens_mean': 1.0, 'generated_tokens_mean': 1.0}
          for id_, won in (('base', base), ('distilled', distilled))]
  return {'rows': rows, 'won': {'rows': {'base': base, 'distilled': distilled}},
          'wall_s': {'a': 60.0}, 'measured': {'machine': 'm', 'date': 'd', 'command': f'c{seed}'}}


def test_seeds_are_merged_game_by_game():
  records = [_record(0, [0, 0, 1, 0], [1, 0, 1, 1]), _record(1, [1, 1, 0, 0], [1, 1, 1, 1])]
  merged = results_table.merge(records)
  base, distilled = merged['rows']
  assert (base['success_rate'], base['by_seed'], base['n']) == (3 / 8, [0.25, 0.5], 8)
  assert distilled['success_rate'] == 7 / 8 and distilled['env_steps_mean'] == 4.5
  (pair,) = merged['paired']
  assert (pair['a'], pair['b'], pair['difference']) == ('distilled', 'base', 0.5)
  assert pair['by_seed'] == [0.5, 0.5]
  # Each seed has two games of difference 1 and two of 0: the mean of eight draws of a fair coin.
  draws = np.random.default_rng(1).binomial(8, 0.5, 200_000) / 8
  np.testing.assert_allclose(pair['ci95'], np.percentile(draws, [2.5, 97.5]), atol=0.01)
  table = results_table.seeds_table(records)
  assert '| 37.5 (' in table and '25.0, 50.0' in table and '`c0`, `c1`' in table


def test_experience_retrieval_is_policies_by_conditions_over_seeds():
  def record(seed, wins):
    rows = [{'id': name, 'n': 4, 'seed': seed, 'success_rate': sum(w) / 4, 'split': 'valid_unseen',
             'env_steps_mean': 1.0} for name, w in wins.items()]
    return {'rows': rows, 'won': {'rows': wins}, 'wall_s': {'a': 60.0},
            'paired': [{'a': 'hard/exprag_lora+matched', 'b': 'hard/lora'},
                       {'a': 'hard/exprag_lora+matched', 'b': 'hard/exprag_lora'}],
            'measured': {'machine': 'm', 'date': '2026-01-01', 'command': 'c'}}

  records = [
    record(seed, {
      'easy/lora': [1, 1, 1, 1], 'hard/lora': [0, 0, 0, 1], 'hard/exprag_lora': [0, 0, 1, 1],
      'hard/exprag_lora+matched': [1, 1, 1, seed]}) for seed in (0, 1)]
  text = results_table.experience_tables(records)
  assert '| hard: success % (95 % interval) | matched | empty |' in text
  assert '| exprag_lora | 87.5 (' in text and '| lora |  | 25.0 (' in text
  assert '- hard/exprag_lora: the empty index costs 37.5 points' in text
  assert '- hard/exprag_lora+matched - hard/lora: +62.5 points' in text
  assert 'by seed +50.0, +75.0' in text
  assert '- hard/exprag_lora+matched - hard/exprag_lora:' not in text
  brief = results_table.experience_tables(records, brief=True)
  assert 'costs' not in brief and '- hard/exprag_lora+matched - hard/lora: +62.5 points' in brief


def test_ablations_are_one_table_against_the_same_games():
  def record(wins, seed=0, tasks=('t0', 't1', 't2', 't3'), **config):
    rows = [{'id': name, 'n': 4, 'seed': seed, 'success_rate': sum(w) / 4}
            for name, w in wins.items()]
    return {'rows': rows, 'won': {'tasks': {'hard': list(tasks)}, 'rows': wins},
            'wall_s': {'a': 60},
            'config': {'seed': seed, 'rank': 32, 'epochs': 9.0, 'evaluate': '', **config},
            'measured': {'machine': 'm', 'date': '2026-01-01', 'command': 'c'}}

  matched = 'hard/exprag_lora+matched'
  reference = record({matched: [1, 1, 1, 0], 'hard/lora': [0, 0, 0, 1]})
  one = record({matched: [0, 0, 0, 0], 'hard/lora': [0, 1, 0, 1]}, epochs=1.0, evaluate='lora')
  text = results_table.ablations_table(reference, {'epoch1': one})
  assert f'| changed | {matched} | hard/lora | ' in text
  assert '| nothing | 75.0 | 25.0 |  |' in text
  assert '| `epochs=1` | 0.0 | 50.0 | -75.0 (-100.0 to ' in text
  assert 'n = 4 games, paired, greedy, seed 0; ' in text
  # Another seed, or other games, is no ablation of it.
  assert results_table._is_ablation(one, reference)
  assert not results_table._is_ablation(reference, reference)
  assert not results_table._is_ablation(record({matched: [1]}, seed=1), reference)
  assert not results_table._is_ablation(record({matched: [1]}, tasks=['t9']), reference)


def test_a_filed_result_names_no_folder_of_the_machine(tmp_path, monkeypatch):
  monkeypatch.setattr(results_table, 'RESULTS', tmp_path / 'results')
  monkeypatch.setenv('HINTSIGHT_DATA', str(tmp_path / 'games'))
  (tmp_path / 'summary.json').write_text(json.dumps({'data': f'{tmp_path}/games/alfworld'}))
  filed = results_table.file_run(tmp_path, 'own', command='a command', machine='a machine')
  assert json.loads(filed.read_text())['data'] == '${HINTSIGHT_DATA}/alfworld'


def test_scores_are_told_where_games_have_parts():
  row = {'id': 'base', 'success_rate': 0.25, 'score_mean': 0.25}
  assert results_table.score_line([row]) == ''
  assert results_table.score_line([row, {**row, 'id': 'sft', 'score_mean': 0.4}]) == (
    'Mean score of 100: base 25.0, sft 40.0.')


def test_a_decoder_says_what_its_environment_can_show(tmp_path, monkeypatch):
  monkeypatch.setattr(results_table, 'RESULTS', tmp_path)
  record = {
    'parameters': 1000, 'tokens': 2000, 'episodes': 30, 'drills': 0, 'wall_s': 120.0,
    'held_out': {'told': {'replies': 0.5, 'rule': 0.9}, 'untold': {'replies': 0.2, 'rule': 0.8}}}
  line = results_table.decoder_line(record)
  assert '30 expert episodes in 2 minutes' in line and '50 %' in line and '20 %' in line
  line = results_table.decoder_line({**record, 'drills': 7})
  assert '7 drills' in line and 'a verb is right in 90 %' in line and '80 %' in line
  # A second stage counts its first one.
  (tmp_path / 'from_scratch_first.json').write_text(json.dumps({**record, 'match_drills': 5}))
  second = {**record, 'drills': 7, 'start_decoder': '${workdir}/../first/small_decoder'}
  line = results_table.decoder_line(second)
  assert '4,000 tokens of 60 expert episodes and 12 drills in 4 minutes' in line


def test_a_filed_run_names_no_folder_of_the_machine(tmp_path, monkeypatch):
  monkeypatch.setattr(results_table, 'RESULTS', tmp_path / 'results')
  run = tmp_path / 'run'
  run.mkdir()
  (run / 'summary.json').write_text(json.dumps({'adapter': f'{run}/lora/adapter'}))
  path = results_table.file_run(run, 'x', command='c', machine='m')
  assert json.loads(path.read_text())['adapter'] == '${workdir}/lora/adapter'
  # Of several in one value, and of a run beside it whose name begins as its own does.
  (run / 'summary.json').write_text(json.dumps({'data': f'{run}/a,{run},{run}_2/b'}))
  path = results_table.file_run(run, 'x', command='c', machine='m')
  assert json.loads(path.read_text())['data'] == '${workdir}/a,${workdir},${workdir}/../run_2/b'
