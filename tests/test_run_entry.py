"""What the watch is told from inside the script's process, by a watch that only says what it hears."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from running import Outcome, report, run, sickbay, write

# Stands in for torch and for sickbay.doctor, so that these tests need neither.
LISTENER = """
    import os, sys, types
    import sickbay

    def say(*words):
        os.write(2, (" ".join(map(str, words)) + "\\n").encode())

    class Watch:
        def finish(self, ended, exception):
            say("told", ended, repr(exception))

    doctor = types.ModuleType("sickbay.doctor")
    doctor.start = lambda settings, rank: say("started", rank, "torch" in sys.modules) or Watch()
    sys.modules["sickbay.doctor"] = sickbay.doctor = doctor
    """


def listen(folder: Path, script: str, torch: str = "say = 1", name: str = "script.py") -> Outcome:
    """The outcome of `script`, beside which a module `torch` lies, under the listening watch."""
    write(folder, LISTENER, "listener.py")
    write(folder, torch, "torch.py")
    (folder / name).write_text("from listener import *\n" + textwrap.dedent(script), encoding="utf-8")
    return run(sickbay("run", "--out", "run", name), folder)


def heard(outcome: Outcome) -> list[str]:
    """What the watch and the script said, in order, up to the card."""
    return outcome.stderr.decode().partition("sickbay  ")[0].splitlines()


def test_told_of_the_end_after_all_of_the_scripts_own(tmp_path: Path) -> None:
    outcome = listen(tmp_path, "import atexit, torch\natexit.register(say, 'mine')\nsay('last line')")
    assert heard(outcome) == ["started 0 True", "last line", "mine", "told finished None"]


def test_told_of_an_exception_before_its_traceback_is_printed(tmp_path: Path) -> None:
    outcome = listen(tmp_path, "import torch\nint('x')")
    said = heard(outcome)
    assert said[0] == "started 0 True"
    assert said[1].startswith("told failed ValueError(")
    assert said[2] == "Traceback (most recent call last):" and said[-1].startswith("ValueError")
    assert outcome.code == 1 and sum(line.startswith("told") for line in said) == 1


def test_told_of_an_exception_that_the_scripts_own_hook_swallows(tmp_path: Path) -> None:
    outcome = listen(tmp_path, "import torch\nsys.excepthook = lambda *three: say('hook')\nint('x')")
    assert [line.partition("(")[0] for line in heard(outcome)] == ["started 0 True", "hook", "told failed ValueError"]


def test_an_exception_that_was_caught_is_no_end(tmp_path: Path) -> None:
    outcome = listen(
        tmp_path,
        """
        import torch
        try:
            int("x")
        except ValueError:
            sys.__excepthook__(*sys.exc_info())
        """,
    )
    assert heard(outcome)[-1] == "told finished None"


@pytest.mark.parametrize("ending", ["sys.exit(0)", "int('x')", "raise KeyboardInterrupt"])
def test_a_forked_child_does_not_end_its_parents_watch(tmp_path: Path, ending: str) -> None:
    outcome = listen(tmp_path, f"import torch\nchild = os.fork()\nif child == 0:\n    {ending}\nos.waitpid(child, 0)\nsay('waited')")
    said = heard(outcome)
    assert said[-2:] == ["waited", "told finished None"]
    assert sum(line.startswith("told") for line in said) == 1


def test_a_watch_is_not_started_in_a_forked_child(tmp_path: Path) -> None:
    outcome = listen(
        tmp_path, "child = os.fork()\nif child == 0:\n    import torch\n    os._exit(torch.say - 1)\nsay(os.waitpid(child, 0)[1])"
    )
    assert heard(outcome) == ["0"]
    assert report(tmp_path)["problems"] == ["the script did not import torch"]


def test_started_once_by_the_first_import_that_succeeds(tmp_path: Path) -> None:
    torch = "import os\nif not os.environ.get('LIBRARY'):\n    raise ImportError('no library')\nsay = 1"
    outcome = listen(
        tmp_path,
        """
        for value in ("", "there", "there"):
            os.environ["LIBRARY"] = value
            try:
                import torch
                say("imported", "exec_module" in vars(torch.__spec__.loader), [f for f in sys.meta_path if "sickbay" in type(f).__module__])
            except ImportError as problem:
                say(problem)
        """,
        torch,
    )
    assert heard(outcome) == ["no library", "started 0 True", "imported False []", "imported False []", "told finished None"]


@pytest.mark.parametrize("failure", ["raise OSError('full')", "raise KeyboardInterrupt", "raise SystemExit(9)"])
def test_a_watch_that_fails_at_the_end_changes_nothing_for_the_script(tmp_path: Path, failure: str) -> None:
    outcome = listen(tmp_path, f"import torch\ndef finish(self, ended, exception):\n    {failure}\nWatch.finish = finish\nint('x')")
    said = heard(outcome)
    assert said[1].startswith("sickbay: the watch did not end well: ")
    assert said[2] == "Traceback (most recent call last):" and said[-1].startswith("ValueError")
    assert outcome.code == 1


def test_a_watch_that_cannot_start_is_named_in_the_report(tmp_path: Path) -> None:
    outcome = listen(tmp_path, "import torch\nprint(torch.say)", name="other.py")
    assert outcome.stdout == b"1\n"
    (tmp_path / "run").rename(tmp_path / "before")
    outcome = listen(tmp_path, "doctor.start = lambda settings, rank: 1 / 0\nimport torch\nprint(torch.say)")
    assert (outcome.code, outcome.stdout) == (0, b"1\n")
    content = report(tmp_path)
    assert content["verdict"] == "unexamined"
    assert content["problems"] == ["the watch could not be started: ZeroDivisionError: division by zero"]


@pytest.mark.parametrize("loaded_before", [True, False])
def test_a_file_named_like_a_library_module_is_not_run_by_sickbay(tmp_path: Path, loaded_before: bool) -> None:
    """sickbay loads its parts when torch arrives; the script's statistics.py must not be run in place of the library's."""
    write(tmp_path, "from listener import say\nsay('script\\'s statistics')", "statistics.py")
    first = "import statistics\n" if loaded_before else ""
    load = "doctor.start = lambda settings, rank: say(__import__('statistics').mean([1, 3])) or Watch()\n"
    outcome = listen(tmp_path, f"{first}{load}import torch\nsay('after')\nimport statistics")
    said = heard(outcome)
    if loaded_before:
        assert said[0] == "script's statistics" and said.count("script's statistics") == 1 and "after" in said
    else:
        assert said == ["2", "after", "script's statistics", "told finished None"]
