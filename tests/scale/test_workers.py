"""Real processes, torchrun's ranks and Ray's actors.

What dies is made again, and what cannot be done is one line.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fewstep.scale import rays
from fewstep.scale.executors import Executor, Local
from fewstep.scale.rays import Ray
from fewstep.scale.settings import Scaling
from fewstep.scale.work import Place
from tests.support.command import command, hashes

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Slowly:
    """Work that takes a while, and writes down who did it."""

    folder: str
    seconds: float = 0.3
    fatal: int | None = None  # the item that ends its process

    def open(self, place: Place) -> Callable[[int], int]:
        return self.do

    def do(self, item: int) -> int:
        (Path(self.folder) / f"begun-{item}-{os.getpid()}").touch()
        if item == self.fatal:
            os._exit(1)
        time.sleep(self.seconds)
        return item * item


def killing(folder: Path, enough: int) -> threading.Thread:
    """Kill, by SIGKILL, who began the last item, once so many were begun."""

    def act() -> None:
        while len(begun := list(folder.glob("begun-*"))) < enough:
            time.sleep(0.05)
        last = max(begun, key=lambda path: path.stat().st_mtime)
        os.kill(int(last.name.split("-")[2]), signal.SIGKILL)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def done(executor: Executor, folder: Path, items: int = 12, **more: Any) -> dict[int, int]:
    with executor:
        pairs = executor.map(Slowly(str(folder), **more), range(items))
        return {item: outcome.value for item, outcome in pairs}


SQUARES = {i: i * i for i in range(12)}


@pytest.fixture
def ray_here() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    yield
    ray.shutdown()


def test_a_process_that_is_killed_is_replaced(tmp_path: Path) -> None:
    thread, executor = killing(tmp_path, 3), Local(2)
    assert done(executor, tmp_path) == SQUARES
    thread.join()
    assert executor.counts.lost == 1


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fewstep.scale.executors import Local;"
        "from tests.scale.test_workers import Slowly\n"
        "if __name__ == '__main__': list(Local(2).map(Slowly(sys.argv[1], 30.0), range(2)))"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    path = os.pathsep.join((str(REPOSITORY / "src"), str(REPOSITORY)))
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], env={**os.environ, "PYTHONPATH": path}
    )
    while len(begun := list(tmp_path.glob("begun-*"))) < 2:
        time.sleep(0.1)
        assert parent.poll() is None
    pids = [int(one.name.split("-")[2]) for one in begun]
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.usefixtures("ray_here")
def test_an_actor_that_is_killed_starts_again(tmp_path: Path) -> None:
    thread, executor = killing(tmp_path, 3), Ray.of(Scaling("ray", 2))
    assert done(executor, tmp_path) == SQUARES
    thread.join()
    assert executor.counts.lost + executor.counts.second >= 1


@pytest.mark.usefixtures("ray_here")
def test_an_item_that_ends_every_actor_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rays, "LOSSES", 1)
    with pytest.raises(ValueError, match="Actor"):
        done(Ray.of(Scaling("ray", 1)), tmp_path, items=3, fatal=1)


def test_a_process_that_is_killed_while_idle_is_replaced(tmp_path: Path) -> None:
    with Local(2) as executor:
        for _ in executor.map(Slowly(str(tmp_path), 0.0), range(4)):
            pass
        assert executor.pool is not None
        for pid in list(executor.pool.pids.values()):
            os.kill(pid, signal.SIGKILL)
        time.sleep(1.0)  # until the pool knows
        found = executor.map(Slowly(str(tmp_path), 0.0), range(12))
        assert {item: outcome.value for item, outcome in found} == SQUARES


def test_a_node_goes_and_another_one_comes(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    gone = cluster.add_node(num_cpus=1)
    try:
        ray.init(address=cluster.address, log_to_driver=False)

        with ThreadPoolExecutor(1) as aside:  # nodes start in the main thread alone
            found = aside.submit(done, Ray.of(Scaling("ray", 2)), tmp_path, seconds=1.0)
            while len(list(tmp_path.glob("begun-*"))) < 4:
                time.sleep(0.05)
            cluster.remove_node(gone)
            cluster.add_node(num_cpus=1)
            assert found.result() == SQUARES
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_an_address_without_a_cluster_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    ran = command(
        *("sample", "--seeds", "0-7", "--out", tmp_path / "out", "--nfe", 1),
        *("--executor", "ray:127.0.0.1:6399"),
    )
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert ran.stderr.count("\n") == 1, ran.stderr
    assert "no Ray cluster answers at 127.0.0.1:6399" in ran.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("ray_here")
def test_a_worker_of_another_version_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rays, "versions", lambda: {"fewstep": "9.9"})
    with pytest.raises(ValueError, match=r"has fewstep \S+, and the run was started with 9\.9"):
        done(Ray.of(Scaling("ray", 1)), tmp_path)


def test_a_worker_that_cannot_import_fewstep_is_one_line(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    (tmp_path / "broken" / "fewstep").mkdir(parents=True)
    broken = "raise ImportError('libcudart.so is missing')"
    (tmp_path / "broken" / "fewstep" / "__init__.py").write_text(broken)
    env = {"env_vars": {"PYTHONPATH": str(tmp_path / "broken")}}
    ray.init(address="local", num_cpus=1, runtime_env=env, log_to_driver=False)
    try:
        with pytest.raises(ValueError, match=r"cannot import fewstep \(libcudart"):
            done(Ray.of(Scaling("ray", 1)), tmp_path)
    finally:
        ray.shutdown()


def test_ranks_of_torchrun_share_the_shards(tmp_path: Path) -> None:
    few = ("--seeds", "0-23", "--nfe", "1", "--batch", "4", "--shards", "6")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "src")}
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*run, "-m", "fewstep", "sample", *few, "--out", str(tmp_path / "two"), "--json"],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert '"made": 6' in ran.stdout
    assert command("sample", *few, "--out", tmp_path / "one").exit_code == 0
    assert hashes(tmp_path / "two" / "shards") == hashes(tmp_path / "one" / "shards")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)])
    if mounted.returncode:
        pytest.skip("cannot mount here")
    try:
        few = ("--seeds", "0-79", "--nfe", "1", "--batch", "8", "--shards", "10")
        ran = command("sample", *few, "--out", disk / "out")
        assert (ran.exit_code, ran.stdout) == (2, "")
        assert "No space left" in ran.stderr
        made = [p for p in (disk / "out" / "shards").iterdir() if p.suffix == ".tar"]
        assert made
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        again = command("sample", *few, "--out", disk / "out")
        assert again.exit_code == 0, again.output
        assert "there already" in again.stdout
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        ran = command("sample", *few, "--out", disk / "other")
        assert (ran.exit_code, ran.stdout) == (2, "")
        assert "Read-only file system" in ran.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)
