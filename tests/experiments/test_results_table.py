"""README's numbers are the committed results."""

import json

import pytest

from experiments import results_table


def test_readme_shows_the_committed_results():
  assert results_table.readme_text() == (results_table._ROOT / 'README.md').read_text()


def test_the_table_says_what_is_not_significant():
  record = json.loads(results_table.DEMO.read_text())
  record['paired'] = [{'a': 'x', 'b': 'y', 'difference': 0.1, 'ci95': [-0.1, 0.3], 'n': 9}]
  assert 'x - y: +10.0 points, 95 % interval -10.0 to +30.0 (not significant)' in (
    results_table.demo_table(record))


def test_a_readme_without_markers_is_refused():
  with pytest.raises(ValueError, match='lacks'):
    results_table.insert('# Title', 'table')
