"""grade.py: a student's file -> a table of points, and for each function that is not right the
first property that fails, in words.

    python -m assignment.grade FILE                  all sets
    python -m assignment.grade FILE --set 3          one of them

Every function is judged in a process of its own, with limits on its time and its memory and with
nowhere to print: one that hangs, ends the program or allocates without end gets 0 points, and the
others are judged as if it were not there. A function gets its points if all of its
properties hold. (The limits guard against accidents, not against malice. They need fork: Linux,
macOS or WSL; the one on memory needs Linux.)
"""

import argparse
import importlib.util
import json
import os
import resource
import select
import signal
import sys
import textwrap
import time
from pathlib import Path

import torch

from assignment.checks import Largest
from assignment.problems import PROBLEMS, SETS, first_failure

SECONDS = 10  # that a function may take, for all of its properties
MEMORY = 2**29  # bytes that it may have beyond those of torch itself


def load(path):
    """The module in a file, whatever its name."""
    spec = importlib.util.spec_from_file_location("students_file", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def function_of(solution, name):
    """A function of a solution. NotImplementedError if it has none of this name."""
    if not callable(getattr(solution, name, None)):
        raise NotImplementedError(f"{name}: the file has no function of this name")
    return getattr(solution, name)


# --------------------------------------------------------------------------------------------------
# A process of its own


def confine(memory):
    """In the child: nowhere to print, no large files, no more memory than it has and `memory`."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if statm.exists():
        size = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))


def isolated(task, seconds, memory=MEMORY):
    """task(tell) in a child -> what it gives back, a text or None; what it told last, and why it
    was cut off, are in the text if it gives back nothing.
    """
    inbox, outbox = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(inbox)
        send = os.fdopen(outbox, "w", buffering=1)

        def tell(**message):
            send.write(json.dumps(message) + "\n")

        try:
            confine(memory)
            tell(result=task(lambda words: tell(words=words)))
        except BaseException as e:
            tell(result=f"{type(e).__name__}: {e}")
        finally:
            os._exit(0)
    os.close(outbox)
    try:
        received, in_time = listen(inbox, time.monotonic() + seconds)
    finally:
        os.close(inbox)
        end(child)
    messages = [json.loads(line) for line in received.decode().splitlines()]
    if messages and "result" in messages[-1]:
        return messages[-1]["result"]
    why = "it ended the process" if in_time else f"it did not end within {seconds:g} seconds"
    return f"{messages[-1]['words']} HERE: {why}" if messages else why


def listen(inbox, until):
    """All that a child writes, and whether it ended before `until`."""
    received = b""
    while (left := until - time.monotonic()) > 0:
        if not select.select([inbox], [], [], left)[0]:
            break
        part = os.read(inbox, 2**16)
        if not part:
            return received, True
        received += part
    return received, False


def end(child):
    """End a child and what it has started."""
    for kill in (os.killpg, os.kill):
        try:
            kill(child, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
    os.waitpid(child, 0)


# --------------------------------------------------------------------------------------------------
# Grades


def grade(path, problems=PROBLEMS, seconds=SECONDS):
    """{name: None, or what is wrong} of the functions in a file."""

    def whole(tell):
        tell("The file can be loaded.")
        load(path)

    if broken := isolated(whole, seconds):
        return {problem.name: broken for problem in problems}

    def judge(problem):
        def task(tell):
            tell("The file can be loaded.")
            solution = load(path)
            try:
                function = function_of(solution, problem.name)
            except NotImplementedError as e:
                return f"NotImplementedError: {e}"
            return first_failure(problem, function, tell)

        return isolated(task, seconds)

    return {problem.name: judge(problem) for problem in problems}


def table(grades, problems=PROBLEMS):
    """The grades as text: points of each function, set and in all; what is wrong, under it."""
    lines = []
    for number in sorted({problem.set for problem in problems}):
        mine = [problem for problem in problems if problem.set == number]
        lines.append(f"set {number}: {SETS[number]}")
        for problem in mine:
            wrong = grades[problem.name]
            points = 0 if wrong else problem.points
            lines.append(f"  {problem.name:<26}{points:>3} / {problem.points}")
            lines += explained(wrong, problem)
        lines.append(f"  {'':<26}{total(mine, grades)}\n")
    return "\n".join([*lines, f"points{'':<22}{total(problems, grades)}"])


def explained(wrong, problem):
    """The lines that say what is wrong, and a hint."""
    if not wrong:
        return []
    if wrong.startswith("NotImplementedError"):
        return [f"      {wrong} (to be written)"]
    said = wrong.replace(" HERE: ", "\nHere: ").splitlines() + [f"Hint: {problem.hint}"]
    wrapped = (textwrap.wrap(line, width=86, subsequent_indent="  ") for line in said)
    return [f"      {line}" for lines in wrapped for line in lines]


def total(problems, grades):
    got = sum(problem.points for problem in problems if not grades[problem.name])
    return f"{got:>3} / {sum(problem.points for problem in problems)}"


def main(given=None):
    about = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("python -m assignment.grade", formatter_class=about)
    parser.add_argument("file", help="a file like assignment/adapters.py")
    parser.add_argument("--set", type=int, choices=SETS, help="this set only")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="a function's time limit")
    args = parser.parse_args(given)
    if not Path(args.file).is_file():
        print(f"grade.py: error: there is no file {args.file}", file=sys.stderr)
        return 2
    # before the first fork: a child cannot use the threads of its parent
    torch.set_num_threads(1)
    # what torch imports at the first use of this, two seconds, no child has to import again
    with Largest():
        torch.zeros(1)
    problems = [problem for problem in PROBLEMS if args.set in (None, problem.set)]
    print(table(grade(args.file, problems, args.seconds), problems))
    return 0


if __name__ == "__main__":
    sys.exit(main())
