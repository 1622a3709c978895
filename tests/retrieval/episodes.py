"""Small episodes for the tests of this room."""

from data.schema import Episode, Step


def episode(steps, *, id='e0', task_id='t0', task_type='make_state',
            instruction='make a dotted mug.', success=False, termination='step_limit',
            env='household'):
  """An episode of (action, observation) pairs; the tokens do not matter here."""
  return Episode(
    id=id, task_id=task_id, env=env, task_type=task_type, split='train',
    instruction=instruction, seed=0, policy='base', agent='plain', memory='none', model='tiny',
    tokenizer='', tokens=[], kinds=[], logprobs=[],
    steps=[Step(reply=action, action=action, observation=answer,
                changed=not answer.startswith('Nothing happens'))
           for action, answer in steps],
    success=success, score=float(success),
    termination='success' if success else termination)


LABELLED = [
  ('go to kiln 1', 'You arrive at kiln 1. The kiln 1 is closed.'),
  ('examine kiln 1',
   'The kiln 1 is closed. A label reads: sort things here while it is open to make them dotted.'),
  ('go to shelf 1', 'You arrive at shelf 1. On the shelf 1, you see a mug 1.'),
]
EFFECT = [
  ('go to shelf 1', 'You arrive at shelf 1. On the shelf 1, you see a mug 1.'),
  ('take mug 1 from shelf 1', 'You pick up the mug 1 from the shelf 1.'),
  ('go to loom 1', 'You arrive at loom 1. On the loom 1, you see nothing.'),
  ('fold mug 1 with loom 1', 'You fold the mug 1 with the loom 1. It is now salty.'),
]
REFUSED = [
  ('go to shelf 1', 'You arrive at shelf 1. On the shelf 1, you see a mug 1.'),
  ('take mug 1 from shelf 1', 'You pick up the mug 1 from the shelf 1.'),
  ('go to fan 1', 'You arrive at fan 1. On the fan 1, you see nothing.'),
  ('sort mug 1 with fan 1', 'Nothing happens. The fan 1 can only feed things.'),
]
