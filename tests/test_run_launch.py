"""Several ranks of one launch share a run's folder; a later launch does not get into it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from running import environment, report, run, sickbay, write

from sickbay.core.errors import UsageError
from sickbay.launch import Rank, run_folder

ALONE = Rank()


def rank(
    number: int, launcher: str = "12@34", host: str = "here", restart: int = 0, key: tuple[str, ...] = ("none", "a", "1", "2", "0")
) -> Rank:
    return Rank(number, 2, restart, key, host, launcher)


def together(folder: Path, *words: str, world_size: int = 2, **changes: str) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of every rank, started side by side as a launcher does."""
    processes = [
        subprocess.Popen(
            sickbay("run", *words),
            cwd=folder,
            env=environment(RANK=str(number), WORLD_SIZE=str(world_size), LOCAL_RANK=str(number), MASTER_PORT="29500", **changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(world_size)
    ]
    outcomes = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=60)
        outcomes.append((process.returncode, stdout, stderr))
    return outcomes


@pytest.mark.parametrize("words", [("--out", "run"), ()])
def test_ranks_share_one_folder_and_rank_zero_writes_the_report(tmp_path: Path, words: tuple[str, ...]) -> None:
    write(tmp_path, "import os, time; time.sleep(float(os.environ['RANK']) / 2); print(os.environ['RANK'], os.environ['WORLD_SIZE'])")
    outcomes = together(tmp_path, *words, "script.py", world_size=3)
    assert [(code, stdout) for code, stdout, _ in outcomes] == [(0, "0 3\n"), (0, "1 3\n"), (0, "2 3\n")]
    assert "sickbay  script.py" in outcomes[0][2]
    assert outcomes[1][2] == outcomes[2][2] == ""
    folder = tmp_path / "run"
    if not words:
        (folder,) = [entry for entry in (tmp_path / "sickbay-runs").iterdir() if entry.is_dir()]
    content = json.loads((folder / "report.json").read_text())
    assert content["run"]["world_size"] == 3
    assert content["problems"] == ["the script did not import torch"]
    assert not [entry.name for entry in folder.iterdir() if entry.name.startswith((".running", ".unwatched"))]


def test_each_rank_keeps_its_own_exit_code(tmp_path: Path) -> None:
    write(tmp_path, "import os, signal, sys; os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '1' else sys.exit(3)")
    assert [code for code, _, _ in together(tmp_path, "--out", "run", "script.py")] == [3, -9]
    assert report(tmp_path)["run"]["exit_code"] == 3


def test_rank_zero_waits_only_so_long(tmp_path: Path) -> None:
    write(
        tmp_path,
        """
        import os, pathlib, time
        started, rank = pathlib.Path("started"), int(os.environ["RANK"])
        if rank:
            started.touch()
        while not (pathlib.Path("run/report.html") if rank else started).exists():  # the page is what rank 0 writes last, after its wait
            time.sleep(0.1)
        1 / rank
        """,
    )
    outcomes = together(tmp_path, "--out", "run", "script.py")
    assert [code for code, _, _ in outcomes] == [1, 0]
    assert any("ranks [1] had not ended" in problem for problem in report(tmp_path)["problems"])


def test_a_later_launch_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "pass")
    assert [code for code, _, _ in together(tmp_path, "--out", "run", "script.py")] == [0, 0]
    before = (tmp_path / "run" / "report.json").read_bytes()
    # Same run id, same port, but a launcher of its own in between.
    command = ["sh", "-c", f"{' '.join(sickbay('run', '--out', 'run', 'script.py'))}; exit $?"]
    again = run(command, tmp_path, env=environment(RANK="0", WORLD_SIZE="2", MASTER_PORT="29500"))
    assert again.code == 2 and b"not empty" in again.stderr
    assert (tmp_path / "run" / "report.json").read_bytes() == before


def test_siblings_are_recognised(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    folder = run_folder(out, "train", rank(0))
    (folder / "record-0.sqlite").touch()
    assert run_folder(out, "train", rank(1)) == folder
    assert run_folder(out, "train", rank(1, launcher="99@1", host="another node")) == folder
    for stranger in (rank(0, launcher="77@8"), rank(0, key=("other", "a", "1", "2", "0")), ALONE):
        with pytest.raises(UsageError, match="not empty"):
            run_folder(out, "train", stranger)


def test_a_restart_by_the_launcher_gets_a_folder_beneath(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    first = run_folder(out, "train", rank(0))
    (first / "report.json").touch()
    assert run_folder(out, "train", rank(0, restart=1, key=("none", "a", "1", "2", "1"))) == first / "restart-1"
    assert run_folder(out, "train", rank(1, restart=1, key=("none", "a", "1", "2", "1"))) == first / "restart-1"


def test_default_folders_are_unique(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    now = datetime(2024, 2, 3, 4, 5, 6)
    names = [run_folder("", "train", ALONE, now).name for _ in range(3)]
    assert names == ["20240203-040506-train", "20240203-040506-train-2", "20240203-040506-train-3"]
    shared = {run_folder("", "train", rank(number), datetime(2024, 2, 3, 4, 5, number)) for number in (0, 1)}
    assert len(shared) == 1


@pytest.mark.parametrize(
    "variables", [{}, {"RANK": "1"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1", "WORLD_SIZE": "2"}]
)
def test_senseless_launch_variables_mean_a_single_process(variables: dict[str, str]) -> None:
    assert Rank.here(variables) == ALONE


@pytest.mark.slow
def test_under_torchrun(tmp_path: Path) -> None:
    write(
        tmp_path,
        """
        import os, sys
        import torch
        import torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.ones(1)
        dist.all_reduce(total)
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 2)).pow(2).mean().backward()
            optimizer.step()
        print(f"rank {dist.get_rank()} sees {int(total)} {sys.argv[1:]}\\n", end="", flush=True)
        dist.destroy_process_group()
        """,
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    outcome = run([*command, "-m", "sickbay", "run", "--out", "run", "script.py", "--lr", "1"], tmp_path)
    assert outcome.code == 0, outcome.stderr
    assert sorted(outcome.stdout.splitlines()) == [b"rank 0 sees 2 ['--lr', '1']", b"rank 1 sees 2 ['--lr', '1']"]
    assert {"record-0.sqlite", "record-1.sqlite", "report.json", "report.html"} <= set(os.listdir(tmp_path / "run"))
    content = report(tmp_path)["run"]
    assert (content["world_size"], content["steps"], content["ended"]) == (2, 3, "finished")
