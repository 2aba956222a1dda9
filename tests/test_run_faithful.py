"""A script cannot tell `sickbay run script.py` from `python script.py`: compared byte for byte."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from running import assert_alike, both, environment, report, run, sickbay, write

ENDINGS = {
    "returns": "print('done')",
    "exit-none": "import sys; sys.exit()",
    "exit-zero": "import sys; sys.exit(0)",
    "exit-three": "import sys; sys.exit(3)",
    "exit-text": "import sys; sys.exit('no data')",
    "exit-tuple": "import sys; sys.exit((1, 2))",
    "exit-true": "import sys; sys.exit(True)",
    "exit-minus-one": "import sys; sys.exit(-1)",
    "exit-256": "import sys; sys.exit(256)",
    "exit-huge": "import sys; sys.exit(2**40 + 7)",
    "raise-system-exit": "raise SystemExit",
    "uncaught": """
        def train(rate):
            raise ValueError(f"bad rate {rate}")

        def main():
            train(3)

        main()
        """,
    "chained": """
        def load():
            try:
                {}["batch"]
            except KeyError as missing:
                raise RuntimeError("no batch") from missing

        try:
            load()
        except RuntimeError:
            int("x")
        """,
    "recursion": """
        def deeper():
            deeper()

        deeper()
        """,
    "exception-group": """
        import sys
        if sys.version_info >= (3, 11):
            raise ExceptionGroup("several", [ValueError(1), TypeError(2)])
        """,
    "own-excepthook": """
        import sys
        sys.excepthook = lambda kind, value, traceback: print("mine", kind.__name__, value, file=sys.stderr)
        raise ValueError("x")
        """,
    "chaining-excepthook": """
        import sys
        before = sys.excepthook
        def hook(kind, value, traceback):
            print("first mine", file=sys.stderr)
            before(kind, value, traceback)
        sys.excepthook = hook
        raise ValueError("x")
        """,
    "broken-excepthook": """
        import sys
        sys.excepthook = lambda kind: None
        raise ValueError("x")
        """,
    "hook-called-by-hand": """
        import sys
        try:
            1 / 0
        except ZeroDivisionError:
            sys.excepthook(*sys.exc_info())
            sys.__excepthook__(*sys.exc_info())
        print("goes on", sys.excepthook is sys.__excepthook__, hasattr(sys, "last_value"))
        """,
    "syntax-error": "def broken(:\n    pass\n",
    "indentation-error": "if True:\nprint(1)\n",
    "os-exit": "import os; os._exit(5)",
    "abort": "import os; os.abort()",
    "segfault": "import ctypes; ctypes.string_at(0)",
    "segfault-with-faulthandler": "import ctypes, faulthandler; faulthandler.enable(); ctypes.string_at(0)",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "terminates-itself": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "keyboard-interrupt": "raise KeyboardInterrupt",
    "alarm": "import signal, time; signal.setitimer(signal.ITIMER_REAL, 0.05); time.sleep(20)",
    "atexit": """
        import atexit
        atexit.register(print, "registered first")
        atexit.register(print, "registered second")
        raise ValueError("x")
        """,
    "exit-in-atexit": "import atexit, os; atexit.register(os._exit, 9)",
    "non-daemon-thread": """
        import threading, time
        threading.Thread(target=lambda: (time.sleep(0.2), print("thread done"))).start()
        print("main done")
        """,
    "thread-raises": """
        import threading
        thread = threading.Thread(target=lambda: 1 / 0, name="worker")
        thread.start()
        thread.join()
        """,
    "forks-and-raises-in-the-child": """
        import os
        child = os.fork()
        if child == 0:
            raise ValueError("in the child")
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
    "broken-pipe": """
        import os, sys
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
        print("x" * 100000)
        """,
    "closes-its-streams": "import os; os.close(0); os.close(1); os.close(2)",
    "deletes-its-modules": "import sys; [sys.modules.pop(name) for name in list(sys.modules) if name.startswith('sickbay')]; print('gone')",
}


@pytest.mark.parametrize("name", ENDINGS)
def test_ends_as_in_plain_python(tmp_path: Path, name: str) -> None:
    write(tmp_path, ENDINGS[name])
    bare, watched = both(tmp_path, "script.py")
    assert_alike(bare, watched)
    run_ = report(tmp_path)["run"]
    assert run_["exit_code"] == (bare.code if bare.code >= 0 else 128 - bare.code)
    assert run_["signal"] == (-bare.code if bare.code < 0 else None)
    assert run_["ended"] == ("killed" if bare.code < 0 else "failed" if bare.code else "finished")


SURROUNDINGS = {
    "argv": "import sys; print(sys.argv, sys.orig_argv[1:])",
    "main-module": """
        import sys
        main = sys.modules["__main__"]
        print(__name__, __file__, __spec__, __package__, __doc__, __builtins__, main.__dict__ is globals(), sorted(globals()))
        """,
    "paths": "import os, sys; print(sys.path, os.getcwd(), sys.executable, sys.prefix)",
    "environment": "import os; print(sorted(os.environ.items()), sorted(os.environb.items()))",
    "environment-of-children": "import subprocess; print(subprocess.run(['env', '-0'], capture_output=True).stdout)",
    "flags": "import sys; print(sys.flags, sys.warnoptions, sys._xoptions, sys.dont_write_bytecode)",
    "no-sitecustomize": "import sys; print([name for name in sys.modules if 'customize' in name], [p for p in sys.path if 'startup' in p])",
    "stack": "import inspect, traceback; print([f.function for f in inspect.stack()]); traceback.print_stack()",
    "warning-levels": "import warnings; warnings.warn('here'); warnings.warn('above', stacklevel=2)",
    "source": """
        import inspect
        def f():
            return 1
        print(inspect.getsource(f), inspect.getfile(f))
        """,
    "dataclass-and-pickle": """
        import dataclasses, pickle, typing
        @dataclasses.dataclass
        class Batch:
            ids: "list[int]"
        print(pickle.loads(pickle.dumps(Batch([1, 2]))), Batch.__module__, typing.get_type_hints(Batch))
        """,
    "signals": """
        import signal
        print([(s.name, signal.getsignal(s)) for s in signal.valid_signals() if isinstance(s, signal.Signals) and s != signal.SIGINT])
        print(signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.sigpending(), signal.getsignal(signal.SIGINT))
        """,
    "threads": "import threading; print([(thread.name, thread.daemon) for thread in threading.enumerate()])",
    "descriptors": "import os; print(sorted(os.listdir('/proc/self/fd'), key=int)[:-1])",
    "stdin": "import sys; print(sys.stdin.read().upper(), sys.stdin.isatty(), sys.stdout.isatty(), sys.stdout.encoding)",
    "random-state": "import random, hashlib; random.seed(0); print(random.random(), hash('a') == hash('a'))",
    "limits": "import resource; print(resource.getrlimit(resource.RLIMIT_CORE), resource.getrlimit(resource.RLIMIT_NOFILE))",
    "umask-and-group": "import os; print(os.umask(0), os.getpgrp() == os.getpgid(os.getppid()))",
    "no-heavy-modules": "import sys; print([name for name in ('torch', 'numpy', 'rich', 'jinja2', 'ctypes') if name in sys.modules])",
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_sees_what_plain_python_shows(tmp_path: Path, name: str) -> None:
    write(tmp_path, SURROUNDINGS[name])
    arguments = ("--out", "x", "--", "-m", "", "ä ö", "--json", "a b")
    bare, watched = both(tmp_path, "script.py", *arguments, stdin=b"some input\n", env=environment(PYTHONHASHSEED="0"))
    assert_alike(bare, watched)
    assert bare.code == 0, bare.stderr


def test_script_in_another_folder_and_through_a_link(tmp_path: Path) -> None:
    write(tmp_path, "import helper, sys; print(sys.argv, sys.path[0], __file__, helper.VALUE)", "deep/real.py")
    write(tmp_path, "VALUE = 7", "deep/helper.py")
    (tmp_path / "link.py").symlink_to("deep/real.py")
    for index, program in enumerate(("deep/real.py", "link.py", "./deep/../link.py", str(tmp_path / "link.py"))):
        bare = run([sys.executable, program], tmp_path)
        assert_alike(bare, run(sickbay("run", "--out", f"run{index}", program), tmp_path))
        assert b"7" in bare.stdout


def test_module_package_and_folder(tmp_path: Path) -> None:
    show = "import sys; print(__name__, __package__, __spec__.name, sys.argv, sys.path[0]); 1 / 0"
    write(tmp_path, "", "pkg/__init__.py")
    write(tmp_path, show, "pkg/__main__.py")
    write(tmp_path, "from . import VALUE\n" + show, "pkg/broken.py")
    write(tmp_path, show, "pkg/train.py")
    write(tmp_path, "import sys; print(__name__, __spec__.name, sys.argv, sys.path[0])", "folder/__main__.py")
    programs = (
        ("-m", "pkg", "--lr", "1"),
        ("-m", "pkg.train", "-m", "x"),
        ("-m", "pkg.broken"),
        ("-m", "pkg.missing"),
        ("folder", "a"),
        ("-m", "this"),
    )
    for index, program in enumerate(programs):
        bare = run([sys.executable, *program], tmp_path)
        watched = run(sickbay("run", "--out", f"run{index}", *program), tmp_path)
        assert_alike(bare, watched)
    assert bare.stdout  # `this` prints its poem


def test_program_on_stdin(tmp_path: Path) -> None:
    bare, watched = both(tmp_path, "-", "a", stdin=b"import sys; print(sys.argv, repr(sys.path[0]))")
    assert_alike(bare, watched)
    assert b"['-', 'a']" in bare.stdout


@pytest.mark.parametrize(
    "options", [("-u",), ("-O",), ("-B", "-W", "error"), ("-Werror", "-X", "utf8"), ("-bb", "-Xdev"), ("-uBO",), ("-P",), ("-s",)]
)
def test_interpreter_options_reach_the_script(tmp_path: Path, options: tuple[str, ...]) -> None:
    if options == ("-P",) and sys.version_info < (3, 11):
        pytest.skip("-P is new in Python 3.11")
    write(tmp_path, "import sys; print(sys.flags, sys.warnoptions, sys._xoptions, sys.orig_argv, sys.stdout.write_through)")
    assert_alike(*both(tmp_path, "script.py", python=options))


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_worker_processes_find_the_classes_of_main(tmp_path: Path, method: str) -> None:
    write(
        tmp_path,
        f"""
        import multiprocessing, os, sys

        class Sample:
            def __init__(self, n): self.n = n

        def work(sample):
            variables = sorted(name for name in os.environ if "SICKBAY" in name)
            return sample.n * 2, variables, [p for p in sys.path if "startup" in p], "sickbay" in sys.modules

        if __name__ == "__main__":
            with multiprocessing.get_context({method!r}).Pool(2) as pool:
                for number, variables, paths, loaded in pool.map(work, [Sample(n) for n in range(3)]):
                    print(number, variables, paths, loaded and {method!r} != "fork")
        """,
    )
    bare, watched = both(tmp_path, "script.py")
    assert_alike(bare, watched)
    assert bare.stdout.splitlines()[2] == b"4 [] [] False"


@pytest.mark.parametrize("name", ["json", "random", "statistics", "platform", "queue", "sqlite3", "inspect"])
def test_modules_of_the_script_that_are_named_like_the_library_are_its_own(tmp_path: Path, name: str) -> None:
    write(tmp_path, "MINE = True", f"{name}.py")
    write(tmp_path, f"import {name}; print({name}.MINE, {name}.__file__)")
    assert_alike(*both(tmp_path, "script.py"))


def test_the_users_own_sitecustomize_still_runs(tmp_path: Path) -> None:
    write(tmp_path, "import os; print('mine', os.environ.get('PYTHONPATH'))", "site/sitecustomize.py")
    write(tmp_path, "import sys, sitecustomize; print(sitecustomize.__file__, sys.path[1:])")
    env = environment(PYTHONPATH=f"{os.environ.get('PYTHONPATH', '')}:{tmp_path / 'site'}:{environment()['PYTHONPATH']}")
    bare, watched = both(tmp_path, "script.py", env=env)
    # The supervisor is a Python process as well, so it greets first.
    greeting = bare.stdout.splitlines(keepends=True)[0]
    assert watched.stdout == greeting + bare.stdout
    assert watched.code == bare.code == 0


@pytest.mark.parametrize("failure", ["1 / 0", "import not_there", "raise ImportError('x', name='sitecustomize')"])
def test_a_failing_sitecustomize_is_reported_as_python_does(tmp_path: Path, failure: str) -> None:
    write(tmp_path, failure, "site/sitecustomize.py")
    write(tmp_path, "import sys; print('sitecustomize' in sys.modules)")
    env = environment(PYTHONPATH=f"{tmp_path / 'site'}:{environment()['PYTHONPATH']}")
    bare, watched = both(tmp_path, "script.py", env=env)
    assert watched.stdout == bare.stdout
    assert watched.stderr.startswith(bare.stderr + bare.stderr)  # once by the supervisor's Python, once by the script's
    assert watched.code == bare.code == 0


def test_descriptors_opened_by_the_shell_reach_the_script(tmp_path: Path) -> None:
    write(tmp_path, "import os; print(os.read(3, 100))")
    write(tmp_path, "from the shell", "data.txt")
    outcome = run(["sh", "-c", f"{sys.executable} -m sickbay run --out run script.py 3<data.txt"], tmp_path)
    assert outcome.stdout == b"b'from the shell'\n"


def test_switched_off_is_plain_python(tmp_path: Path) -> None:
    write(
        tmp_path,
        "import os, sys; print(sys.orig_argv, sys.argv, sorted(sys.modules)); print(os.getppid() == int(sys.argv[1])); raise ValueError(1)",
    )
    env = environment(SICKBAY="0")
    arguments = ("script.py", str(os.getpid()), "--x")
    bare, watched = both(tmp_path, *arguments, env=env)
    assert (watched.code, watched.stdout, watched.stderr) == (bare.code, bare.stdout, bare.stderr)
    assert b"True" in bare.stdout
    assert not (tmp_path / "run").exists()
