"""Rows of an evaluation: what they mean, and which differences are reported."""

import pytest

from data import errors
from experiments import evaluation_rows


def test_rows_say_who_plays_with_what():
  rows = evaluation_rows.parse('base, base+hints,distilled+random,base+hints@6,base+self-hints@2')
  assert rows == [
    evaluation_rows.Row('base', 'base'),
    evaluation_rows.Row('base+hints', 'base', 'hints'),
    evaluation_rows.Row('distilled+random', 'distilled', 'hints', 'random'),
    evaluation_rows.Row('base+hints@6', 'base', 'hints', '', 6),
    evaluation_rows.Row('base+self-hints@2', 'base', 'hints', '', 2, 'self')]


@pytest.mark.parametrize('text, says', [
  ('sft', 'needs the row base'), ('base,base', 'base twice'), ('base,other', "'other'"),
  ('base,base+', "'base\\+'"), ('base,base+memory', "'base\\+memory'"),
  ('base,base+hints@0', "'base\\+hints@0'"), ('base,base+hints@x', 'hints@x'),
  ('base,base@3', "'base@3'"), ('base,base+nobody-hints', 'nobody-hints'), ('', 'row base')])
def test_rows_without_meaning_are_refused(text, says):
  with pytest.raises(errors.UserError, match=says):
    evaluation_rows.parse(text)


def test_every_row_is_compared_with_what_isolates_its_effect():
  rows = evaluation_rows.parse('base,base+hints,sft,distilled,sft+hints,base+random')
  assert evaluation_rows.pairs(rows) == [
    ('base+hints', 'base'), ('sft', 'base'), ('distilled', 'base'), ('sft+hints', 'base'),
    ('base+random', 'base'), ('sft+hints', 'sft'), ('base+hints', 'base+random'),
    ('distilled', 'sft'), ('distilled', 'base+hints')]
  assert evaluation_rows.pairs(evaluation_rows.parse('base')) == []
