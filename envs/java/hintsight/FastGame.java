package hintsight;

import java.lang.reflect.Field;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.TreeSet;
import language.model.ActionRequestDef;
import scala.Option;
import scala.Tuple2;
import scala.Tuple3;
import scala.Tuple4;
import scala.collection.Iterator;
import scala.collection.mutable.HashSet;
import scienceworld.actions.Action;
import scienceworld.input.InputParser;
import scienceworld.input.InputParser$;
import scienceworld.objects.agent.Agent;
import scienceworld.objects.portal.Portal;
import scienceworld.runtime.AgentInterface;
import scienceworld.runtime.pythonapi.PythonInterface;
import scienceworld.struct.EnvObject;
import scienceworld.tasks.goals.GoalSequence;
import scienceworld.tasks.goals.ObjMonitor;

/**
 * A loaded game of ScienceWorld, stepped without what a player never sees.
 *
 * <p>The simulator spells out all names of all objects in reach ("cup", "cup in kitchen", ...) for
 * every command that an input may be, and once more for a log; that is nine tenths of a step. Here
 * a name is spelled out only where the input begins with it. Answers are the same.
 */
public final class FastGame {
  private static final String[] BY_THE_INTERFACE = {"help", "objects", "task"};

  private static final scala.collection.immutable.Set$ NOTHING =
      scala.collection.immutable.Set$.MODULE$;

  private final PythonInterface game;
  private final AgentInterface agent;

  /** Wraps what `game` has loaded; to be made anew after every load. */
  public FastGame(PythonInterface game) throws ReflectiveOperationException {
    this.game = game;
    this.agent = game.agentInterface().get();
    Field parser = AgentInterface.class.getDeclaredField("inputParser");
    parser.setAccessible(true);
    parser.set(agent, new Parser(agent.actionHandler().getActions()));
  }

  /**
   * Takes a step.
   *
   * @return the answer, the score (0 to 1, below 0 for a failed task), whether the task is over, and
   *     what the room and the inventory look like after it, in one text for one round trip: parts
   *     are separated by U+001E.
   */
  public String step(String input) {
    String answer;
    double score;
    boolean completed;
    if (Arrays.asList(BY_THE_INTERFACE).contains(input.trim().toLowerCase())) {
      answer = game.step(input);
      score = game.getScore();
      completed = game.getCompleted();
    } else {
      Tuple3<String, Object, Object> result = agent.step(input);
      answer = result._1();
      score = ((Number) result._2()).doubleValue();
      completed = (Boolean) result._3();
      game.score_$eq(score);
      game.isComplete_$eq(completed);
      if (answer.isEmpty()) {
        answer = "Unknown action.  Type 'help' for a list of actions, and 'objects' for a list of"
            + " possible object referents. ";
      }
    }
    return String.join(
        "\u001e", answer, Double.toString(score), Boolean.toString(completed),
        game.freeActionLook(), game.freeActionInventory());
  }

  /** What EnvObject.getContainedObjectsAndPortalsRecursive returns, in the same order. */
  public static scala.collection.immutable.Set<EnvObject> within(
      EnvObject object, boolean hidden, boolean connections) {
    HashSet<EnvObject> found = new HashSet<>();
    collect(object, hidden, connections, found);
    return found.toSet();
  }

  /**
   * What EnvObject.getContainedObjects and getPortals return of their sets, in the same order: most
   * are empty, and the library goes through a table of 32 places to find that out.
   */
  public static <T extends EnvObject> scala.collection.immutable.Set<T> copy(
      scala.collection.mutable.Set<T> objects, boolean hidden) {
    if (objects.isEmpty()) {
      return NOTHING.empty();
    }
    if (hidden) {
      return objects.toSet();
    }
    HashSet<T> seen = new HashSet<>();
    Iterator<T> all = objects.iterator();
    while (all.hasNext()) {
      T one = all.next();
      if (!one.isHidden()) {
        seen.add(one);
      }
    }
    return seen.toSet();
  }

  private static void collect(
      EnvObject object, boolean hidden, boolean connections, HashSet<EnvObject> found) {
    List<EnvObject> inside = new ArrayList<>();
    Iterator<EnvObject> objects = object.getContainedObjects(true).iterator();
    while (objects.hasNext()) {
      EnvObject one = objects.next();
      if (hidden || !one.isHidden()) {
        inside.add(one);
        found.add(one);
      }
    }
    List<EnvObject> connected = new ArrayList<>();
    Iterator<Portal> portals = object.getPortals(true).iterator();
    while (portals.hasNext()) {
      Portal portal = portals.next();
      if (hidden || !portal.isHidden()) {
        found.add(portal);
        if (connections) {
          Iterator<EnvObject> ends = portal.getConnectionPoints().iterator();
          while (ends.hasNext()) {
            connected.add(ends.next());
          }
        }
      }
    }
    for (EnvObject one : inside) {
      collect(one, hidden, connections, found);
    }
    for (EnvObject one : connected) {
      found.add(one);
    }
  }

  /** The simulator's parser with another way to find the objects that an input may mean. */
  public static final class Parser extends InputParser {
    // Lower-case text -> its words without articles; a game has some thousand names.
    private final Map<String, String> words = new HashMap<>();
    // Object -> its names, while one input is parsed: nothing changes then.
    private final Map<Long, List<String>> names = new HashMap<>();

    public Parser(ActionRequestDef[] actions) {
      super(actions);
    }

    @Override
    public Tuple4<Object, String, String, Option<Action>> parse(
        String input, EnvObject root, EnvObject universe, Agent agent, ObjMonitor monitor,
        GoalSequence goals, EnvObject perspective) {
      names.clear();
      return super.parse(input, root, universe, agent, monitor, goals, perspective);
    }

    /** As the method that it overrides: (rest of the input, object) of every name it begins with. */
    @Override
    @SuppressWarnings("unchecked")
    public Tuple2<Object, Tuple2<String, EnvObject>[]> matchObj(
        String input, EnvObject[] objects, EnvObject perspective) {
      List<Tuple2<String, EnvObject>> found = new ArrayList<>();
      for (EnvObject object : objects) {
        for (String name : namesAtStart(input, object, perspective)) {
          found.add(new Tuple2<>(input.substring(name.length()).trim(), object));
        }
      }
      return new Tuple2<>(
          !found.isEmpty(), (Tuple2<String, EnvObject>[]) found.toArray(new Tuple2[0]));
    }

    private List<String> namesAtStart(String input, EnvObject object, EnvObject perspective) {
      TreeSet<String> full = new TreeSet<>();
      for (String name : namesOf(object, perspective)) {
        // "cup in kitchen" begins with "cup".
        if (name.trim().isEmpty() || !input.startsWith(wordsOf(name.toLowerCase()))) {
          continue;
        }
        full.add(name.toLowerCase());
        if (object.getContainer().isDefined()) {
          for (String outer : namesOf(object.getContainer().get(), null)) {
            full.add((name + " in " + outer).toLowerCase());
            full.add((name + " on " + outer).toLowerCase());
          }
        }
      }
      List<String> matching = new ArrayList<>();
      for (String name : full) {
        if (name.length() > 1 && input.startsWith(wordsOf(name))) {
          matching.add(wordsOf(name));
        }
      }
      matching.sort(null);
      return matching;
    }

    private String wordsOf(String text) {
      return words.computeIfAbsent(
          text, key -> String.join(" ", InputParser$.MODULE$.tokenize(key)));
    }

    /** Names without containers; a door's depend on the side that it is seen from, if from any. */
    private List<String> namesOf(EnvObject object, EnvObject perspective) {
      boolean door = object instanceof Portal && perspective != null;
      long key = door ? -object.uuid() : object.uuid();
      List<String> known = names.get(key);
      if (known == null) {
        known = new ArrayList<>();
        Iterator<String> all = door
            ? ((Portal) object).getReferents(perspective).iterator()
            : object.getReferents().iterator();
        while (all.hasNext()) {
          known.add(all.next());
        }
        names.put(key, known);
      }
      return known;
    }
  }
}
