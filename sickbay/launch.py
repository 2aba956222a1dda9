"""Which process of a launch this is, and the run's folder that all its ranks share."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sickbay.core.errors import UsageError

RUNS = "sickbay-runs"
OWNER = ".launch.json"
# How long rank 0 waits for its siblings to end before it writes the report: longer if it ended well, since they then end by themselves.
SECONDS_FOR_SIBLINGS = 10.0
SECONDS_FOR_SIBLINGS_OF_A_FAILURE = 3.0


@dataclass(frozen=True)
class Rank:
    """This process's place in a launch, from torchrun's environment; `key` is equal for all ranks of one launch and for no other."""

    rank: int = 0
    world_size: int = 1
    restart: int = 0
    key: tuple[str, ...] = ()
    host: str = ""
    launcher: str = ""

    @classmethod
    def here(cls, environment: Mapping[str, str] | None = None) -> Rank:
        """Read from RANK, WORLD_SIZE, TORCHELASTIC_* and MASTER_*; a single process if they are absent or senseless."""
        environment = os.environ if environment is None else environment
        try:
            rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            restart = int(environment.get("TORCHELASTIC_RESTART_COUNT") or 0)
        except (KeyError, ValueError):
            return cls()
        if not 0 <= rank < world_size:
            return cls()
        names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
        key = tuple(environment.get(name, "") for name in names)
        return cls(rank, world_size, restart, key, os.uname().nodename, _process_identity(os.getppid()))

    def is_sibling(self, owner: Mapping[str, object]) -> bool:
        """True if the folder's `owner` is of the same launch as this rank."""
        if self.world_size == 1 or owner.get("key") != list(self.key):
            return False
        # Run ids and ports are used again by later launches; the launcher's process is not.
        return owner.get("host") != self.host or owner.get("launcher") == self.launcher


def run_folder(out: str, stem: str, rank: Rank, now: datetime | None = None) -> Path:
    """An absolute, existing, writable folder that holds no other run; the same one for every rank of a launch. Raises UsageError."""
    folder = Path(os.path.abspath(out)) if out else Path(os.path.abspath(RUNS))
    try:
        if not out:
            return _new_folder(folder, f"{now or datetime.now():%Y%m%d-%H%M%S}-{stem}", rank)
        if rank.restart:
            # The launcher starts the script again after a failure; the first attempt's record must not be lost.
            folder = folder / f"restart-{rank.restart}"
        _take(folder, rank)
    except FileExistsError:
        raise UsageError(f"--out {folder} is a file: name a folder") from None
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise UsageError(f"cannot write to the run's folder {folder}: {reason}; name another with --out DIR") from None
    return folder


def is_running(folder: Path, rank: Rank, running: bool) -> None:
    """Whether `rank` still writes into `folder` is on file for its siblings."""
    if rank.world_size > 1:
        try:
            _marker(folder, rank.rank).touch() if running else _marker(folder, rank.rank).unlink(missing_ok=True)
        except OSError:  # it costs rank 0 a few seconds of waiting
            pass


def wait_for_siblings(folder: Path, rank: Rank, failed: bool) -> list[int]:
    """All other ranks have ended, or the time for it is over; returns the ranks that are still running."""
    if rank.world_size == 1:
        return []
    until = time.monotonic() + (SECONDS_FOR_SIBLINGS_OF_A_FAILURE if failed else SECONDS_FOR_SIBLINGS)
    while True:
        running = [other for other in range(rank.world_size) if other != rank.rank and _marker(folder, other).exists()]
        if not running or time.monotonic() > until:
            return running
        time.sleep(0.05)


def _marker(folder: Path, rank: int) -> Path:
    return folder / f".running-{rank}"


def _new_folder(runs: Path, name: str, rank: Rank) -> Path:
    runs.mkdir(parents=True, exist_ok=True)
    if rank.world_size > 1:
        # The ranks start at different seconds: the first one's name is everybody's.
        import hashlib

        digest = hashlib.sha256(repr((rank.key, rank.host, rank.launcher)).encode()).hexdigest()[:16]
        name = _first_claim(runs / f".launch-{digest}", name)
        folder = runs / name
        _take(folder, rank)
        return folder
    for attempt in itertools.count(1):
        folder = runs / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise AssertionError("unreachable: the loop above has no end")


def _take(folder: Path, rank: Rank) -> None:
    """`folder` exists, can be written and is this launch's own. Raises UsageError if it is another's, OSError if it cannot be written."""
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    held = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    if rank.world_size > 1 and (not held or (folder / OWNER).exists()):
        mine = json.dumps({"key": rank.key, "host": rank.host, "launcher": rank.launcher})
        held = [] if rank.is_sibling(json.loads(_first_claim(folder / OWNER, mine))) else held or [OWNER]
    if held:
        raise UsageError(f"the run's folder {folder} is not empty (it holds {held[0]}): name another with --out DIR, or remove it first")
    if existed:
        probe = folder / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()


def _first_claim(path: Path, claim: str) -> str:
    """The content of `path`: `claim` if nobody had claimed it before. Readers never see half of it."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.{os.uname().nodename}")
    draft.write_text(claim, encoding="utf-8")
    try:
        os.link(draft, path)
    except FileExistsError:
        return path.read_text(encoding="utf-8")
    finally:
        draft.unlink()
    return claim


def _process_identity(pid: int) -> str:
    """Tells process `pid` from every other one of this machine since it was started, also from later ones with the same number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return str(pid)
    since_boot = stat.rpartition(")")[2].split()[19]  # field 22 of proc(5): start time in clock ticks
    return f"{pid}@{since_boot}"
