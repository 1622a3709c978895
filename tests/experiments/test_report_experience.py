"""The pages of an experience retrieval: what was retrieved, how like, how it ended, who played."""

import dataclasses
import json

import pytest

from data import errors, summary, trajectory
from experiments import experience_rows, report
from retrieval import experience as experience_lib
from tests.experiments import browser
from tests.experiments import test_report as hints_report

_EVIL = hints_report._EVIL
_ROWS = 'frozen,lora,exprag_lora+matched,distilled'


def _retrieved(step, name, text, outcome='success'):
  return {'id': name, 'score': 0.875 - step / 8, 'text': text, 'outcome': outcome,
          'provenance': f'expert on train/{name}, from index/easy {_EVIL}', 'step': step}


@pytest.fixture
def workdir(tmp_path):
  """A small finished run whose every text is hostile."""
  root = tmp_path / 'run'
  rows, records, played = experience_rows.parse(_ROWS), [], {}
  for row in rows:
    memory = 'experience' if row.bank else 'none'
    episodes = [
      dataclasses.replace(e, memory=memory, task_id=f'{row.split}/{e.task_id}', retrieved=[
        _retrieved(0, 'a', f'{{"user":"{_EVIL}"}}'),
        _retrieved(0, 'b', 'other', 'failure'),
        _retrieved(2, 'b', '', 'failure'), _retrieved(2, 'c', 'third')] if row.bank else [])
      for e in hints_report._play(row.policy, 'hints' if row.bank else 'none')]
    hints_report._write(root / 'evaluation' / row.id, episodes)
    played[row.id] = episodes
    records.append({
      **summary.row(episodes, id=row.id, policy=row.policy, memory=memory, split='valid_unseen',
                    seed=0),
      'tasks': row.split, 'condition': row.condition,
      'same_kind_retrieved': 0.75 if row.bank else None})
  for name in ('lora', 'exprag_lora'):
    (root / name).mkdir()
    (root / name / 'done.json').write_text(json.dumps({'trained': 3}))
    (root / name / 'metrics.jsonl').write_text(
      ''.join(json.dumps({'step': i, 'loss': 1 / i, 'accuracy': 0.5}) + '\n' for i in range(1, 9)))
  bank = experience_lib.ExperienceBank([experience_lib.Experience(
    'a', 'train/a', 'household', 'make_state', 'train', 'make a tall mug.', 'A room.', (), True,
    'expert', 'index/easy/expert')])
  bank.provenance['sources'] = [
    {'run': f'index/easy/expert {_EVIL}', 'policy': 'expert', 'successes': 41, 'failures': 7}]
  bank.save(root / 'index' / 'easy' / 'bank')
  config = {'model': f'tiny {_EVIL}', 'env': 'household', 'agent': 'plain', 'experience_k': 2,
            'base': '', 'tokenizer': '', 'seed': 0, 'teacher': 'exprag_lora'}
  (root / 'config.json').write_text(json.dumps(config))
  (root / 'summary.json').write_text(json.dumps({
    'experiment': 'experience_retrieval', 'rows': records,
    'paired': [summary.paired(played[a], played[b], a_id=a, b_id=b, resamples=50)
               for a, b in experience_rows.pairs(rows)],
    'wall_s': {'lora': 60.0}, 'config': config, 'versions': {'jax': '0'}}))
  return root


def test_one_page_a_split_with_similarity_outcome_and_provenance(workdir):
  pages = report.write(workdir)
  assert [page.name for page in pages] == ['report-easy.html', 'report-hard.html']
  text = pages[1].read_text()
  data = hints_report._embedded(text)
  assert data['policies'] == ['frozen', 'lora', 'exprag_lora+matched', 'distilled']
  assert data['memory'] == 'experiences' and len(data['games']) == 4
  assert (data['teacher'], data['student'], data['base']) == (2, 3, 0)
  found = data['games'][0]['episodes'][2]['retrieved']
  assert [r['step'] for r in found] == [0, 0, 2, 2]
  assert [r['outcome'] for r in found] == ['success', 'failure', 'failure', 'success']
  # What a later block holds again is shown again, though the record has its text once.
  assert [r['text'] for r in found] == [f'{{"user":"{_EVIL}"}}', 'other', 'other', 'third']
  assert found[0]['score'] == 0.875 and 'expert on train/a' in found[0]['provenance']
  scan = ' '.join(hints_report._Scan(text).text)
  for words in ('The experience banks', '41', 'with a success at the same kind of task', '75.0 %',
                'Experience retrieval, hard tasks', 'with the index of its own split'):
    assert words in scan
  assert 'k = 2 experiences' in scan and 'hints removed' not in scan


def test_hostile_text_stays_text(workdir):
  for page in report.write(workdir):
    text = page.read_text()
    assert _EVIL not in text
    assert text.count('<script') == 2


def test_a_page_of_a_run_whose_bank_is_gone(workdir):
  next((workdir / 'index' / 'easy' / 'bank').glob('experiences-*')).unlink()
  with pytest.raises(errors.UserError, match='are torn'):
    report.write(workdir)


def test_episodes_that_are_missing(workdir):
  journal = workdir / 'evaluation' / 'easy' / 'lora' / trajectory.JOURNAL_NAME
  journal.write_text(journal.read_text().split('\n')[0] + '\n')
  with pytest.raises(errors.UserError, match='holds 1 episodes and summary'):
    report.write(workdir)


@pytest.mark.skipif(not browser.PATH, reason='no chromium is installed: the page is not rendered')
def test_the_reader_shows_each_block_with_similarity_outcome_and_provenance(workdir, tmp_path):
  with browser.Browser(tmp_path / 'profile') as chromium:
    for width in (1200, 400):
      chromium.show(width)
      chromium.open(report.write(workdir)[0])
      assert chromium.console == []
      assert chromium.run('document.documentElement.dataset.ready') == '1'
      assert chromium.run(hints_report._WIDTHS) == [width, []]
      assert chromium.run(hints_report._LOW_CONTRAST) == []
    box = chromium.run("""(() => {
      const box = document.querySelector('.retrieved');
      return [[...box.querySelectorAll('p')].map((e) => e.textContent),
        [...box.querySelectorAll('.score')].map((e) => e.textContent),
        [...box.querySelectorAll('summary')].map((e) => e.textContent)];
    })()""")
  assert box[0] == ['retrieved experiences, with their similarity',
                    'retrieved experiences, with their similarity, from call 3 on']
  assert box[1] == ['0.875', '0.875', '0.625', '0.625']
  assert [text.split()[0] for text in box[2]] == ['solved', 'failed', 'failed', 'solved']
  assert all(f'from index/easy {_EVIL}' in text for text in box[2])
