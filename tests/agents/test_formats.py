import pytest

from agents import formats
from data import errors
from envs.base import Decision

HISTORY = [
  formats.Turn('go to desk 1', 'You arrive at desk 1.'),
  formats.Turn('take mug 2 from desk 1', 'You pick up the mug 2 from the desk 1.'),
  formats.Turn('go to sofa 3', 'Nothing happens.', changed=False),
  formats.Turn('take pen 1 from desk 1', 'You pick up the pen 1 from the desk 1.'),
  formats.Turn('go to shelf 1', 'You arrive at shelf 1.'),
  formats.Turn('move mug 2 to shelf 1', 'You move the mug 2 to the shelf 1.'),
]


@pytest.mark.parametrize('name', formats.FORMATS)
@pytest.mark.parametrize('history', [[], HISTORY])
@pytest.mark.parametrize('thought', ['', 'It may be in a drawer: open it.'])
def test_what_is_rendered_is_parsed_back(name, history, thought):
  reply_format = formats.get_format(name)
  replies = reply_format.render(Decision('open drawer 1', thought), 'find a pen', history)
  parsed = [reply_format.parse(reply) for reply in replies]
  assert [p.kind for p in parsed[:-1]] == ['thought'] * (len(replies) - 1)
  assert (parsed[-1].kind, parsed[-1].action) == ('action', 'open drawer 1')
  if name in ('react', 'stateact') and thought:
    assert thought in [p.thought for p in parsed]


@pytest.mark.parametrize('reply, kind, action, thought', [
  ('go to desk 1', 'action', 'go to desk 1', ''),
  ('  > go to desk 1 \n', 'action', 'go to desk 1', ''),
  ('Action: go to desk 1', 'action', 'go to desk 1', ''),
  ('think: it is\nin a drawer', 'thought', '', 'it is in a drawer'),
  ('> Think: hm', 'thought', '', 'hm'),
  ('think:', 'invalid', '', ''),
  ('', 'invalid', '', ''),
  ('>', 'invalid', '', ''),
  ('go to desk 1\nopen desk 1', 'invalid', '', ''),
])
def test_react_replies(reply, kind, action, thought):
  parsed = formats.ReAct().parse(reply)
  assert (parsed.kind, parsed.action, parsed.thought) == (kind, action, thought)
  assert bool(parsed.problem) == (kind == 'invalid')


def test_a_thought_is_no_command_of_plain():
  assert formats.Plain().parse('think: hm').action == 'think: hm'


def test_stateact_block_holds_the_public_state():
  block, = formats.StateAct().render(Decision('look', 'why'), 'find a pen', HISTORY)
  assert block.splitlines() == [
    'goal: find a pen', 'locations visited: desk 1, shelf 1', 'current location: shelf 1',
    'current inventory: pen 1', 'thought: why', 'action: look']
  parsed = formats.StateAct().parse(block)
  assert parsed.fields['current inventory'] == 'pen 1' and parsed.thought == 'why'


@pytest.mark.parametrize('reply', ['', 'go to desk 1', 'goal: x\nthought: y', 'goal: x\naction:'])
def test_stateact_without_an_action_is_invalid(reply):
  parsed = formats.StateAct().parse(reply)
  assert parsed.kind == 'invalid' and 'action' in parsed.problem


def test_unknown_format_names_those_there_are():
  with pytest.raises(errors.UserError, match=r'reackt.*react'):
    formats.get_format('reackt')


SHOPPING = [
  formats.Turn('search[red mug]', 'Page 1'),
  formats.Turn('click[b01]', 'Mug'),
  formats.Turn('click[red]', 'You have it.'),
  formats.Turn('click[purple]', 'Invalid action.', changed=False),
  formats.Turn('click[features]', 'Of clay.'),
]


def test_stateact_in_the_shop_says_where_it_is_and_what_is_chosen():
  render = lambda history: formats.ShopStateAct().render(
    Decision('click[buy now]', 'why'), 'buy a mug', history)[0].splitlines()
  assert render(SHOPPING) == [
    'goal: buy a mug', 'current location: features of b01', 'current selection: red',
    'action: click[buy now]']
  assert render([*SHOPPING, formats.Turn('click[< prev]', 'Mug')])[1:3] == [
    'current location: product b01', 'current selection: red']
  assert render([*SHOPPING[:3], formats.Turn('click[< Prev]', 'Page 1')])[1:3] == [
    'current location: results page', 'current selection: none']
  assert render([*SHOPPING, formats.Turn('click[back to search]', '')])[1] == (
    'current location: search page')
  assert render([*SHOPPING[:1], formats.Turn('click[next >]', '')])[1] == (
    'current location: results page')


def test_stateact_in_scienceworld_reads_the_rooms_and_the_inventory_off_the_answers():
  turns = [('look around', 'This room is called the hallway. In it, you see: \n\ta picture'),
           ('open door to kitchen', 'The door is already open.'),
           ('go to kitchen', 'You move to the kitchen.'),
           ('pick up metal pot', 'You move the metal pot to the inventory.'),
           ('pick up cup', 'Ambiguous request: Please enter the number for the action'),
           ('1', 'You move the glass cup to the inventory.'),
           ('move metal pot to sink', 'You move the metal pot to the sink.'),
           ('teleport to art studio', 'You teleport to the art studio.')]
  history = [formats.Turn(*turn) for turn in turns]
  render = lambda history: formats.get_format('stateact_scienceworld').render(
    Decision('wait', ''), 'boil water', history)[0].splitlines()
  assert render(history) == [
    'goal: boil water', 'locations visited: hallway, kitchen, art studio',
    'current location: art studio', 'current inventory: glass cup', 'thought: -', 'action: wait']
  outside = [formats.Turn('look around', 'This outside location is called the outside. Here')]
  assert render(outside)[2] == 'current location: outside'
  assert render([])[1:4] == [
    'locations visited: none', 'current location: where I started', 'current inventory: nothing']


def test_an_environment_s_own_form_of_a_format_is_taken():
  assert formats.name_for('stateact', 'webshop') == 'stateact_webshop'
  assert formats.name_for('react', 'webshop') == 'react_webshop'
  assert formats.name_for('plain', 'webshop') == 'plain'
  assert formats.name_for('stateact', 'household') == 'stateact'
  assert formats.name_for('stateact', 'scienceworld') == 'stateact_scienceworld'
  assert 'four lines: "goal:", "current location:"' in formats.ShopStateAct().instructions
