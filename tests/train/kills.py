"""Kill training runs with signal 9 at random moments, start them again, and compare with a run left alone.

  python tests/train/kills.py --count 100 --seed 0

A run of 12 steps saves every 4 and exports at the end: of the smallest hybrid or GPT, by one process or by two ranks
under torchrun. Killed are all of a run's processes, or one alone. After each kill a copy of the run directory is
started again and must exit with 0 and leave what the straight run left: the same losses to the last bit, the same
files, the same exported weights. The directory itself takes the next kill, up to --each. Prints a line per kill and a
table; exits with 1 if anything differs. --first N goes on at run N of the same seed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]
from conftest import ROOT, SMALL, SMALL_HYBRID, TORCHRUN, losses, recipe  # noqa: E402

from nemotron_sft.train.checkpoints import newest_iteration  # noqa: E402
from nemotron_sft.train.progress import read_metrics  # noqa: E402

STEPS, EVERY = 12, 4
RUN = [f"train.train_iters={STEPS}", f"checkpoint.save_interval={EVERY}", "export.hf=true", "tracking=disabled"]
MODELS = {"hybrid": SMALL_HYBRID, "gpt": SMALL}
KINDS = [("hybrid", 2), ("gpt", 1), ("hybrid", 1), ("gpt", 2)]  # model and ranks of one run after the other
# Where a kill can hit, in the order of a run. A run whose last step is saved has no more of STEP and SAVING.
PLACES = START, STEP, SAVING, AFTER, EXPORT = "start-up", "a step", "saving", "after the last save", "export"
DONE = "after the export"
PATIENCE = 400  # seconds for a run of seconds
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


class Attempt:
    """One start of the training command, and what its run directory shows of how far it has come."""

    def __init__(self, data: Path, run_dir: Path, model: str, ranks: int):
        self.run_dir, self.ranks, self.began = run_dir, ranks, time.time()
        self.resumed = saved(run_dir)
        self.output = run_dir.with_name(f"{run_dir.name}.log")
        command = [*(TORCHRUN if ranks > 1 else [sys.executable]), "recipes/train.py", f"data={data}"]
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [*command, f"run_dir={run_dir}", *MODELS[model], *RUN], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH},
            )  # fmt: skip

    def changed(self, name: str) -> bool:
        """Whether this attempt wrote a file of the run, or in a directory of it."""
        path = self.run_dir / name
        with contextlib.suppress(OSError):
            return any(part.stat().st_mtime > self.began for part in (path, *(path.iterdir() if path.is_dir() else ())))
        return False

    def at(self, place: str) -> bool:
        """Whether the attempt has come to a place, or past it: SAVING is that of any step."""
        if place == START:
            return True
        if place == EXPORT:
            return self.changed(".hf.partial")
        if place == DONE:
            return self.changed("hf")
        if not self.changed("metrics.jsonl"):
            return False
        return place == STEP or (saved(self.run_dir) == STEPS if place == AFTER else self.saving() > 0)

    def saving(self) -> int:
        """The step whose checkpoint this attempt is writing, 0 if none."""
        step = saved(self.run_dir) + EVERY
        return step if self.changed(f"checkpoints/iter_{step:07}") else 0

    def place(self) -> str:
        """Where the attempt is, or was when it ended."""
        return next(place for place in (EXPORT, DONE, AFTER, SAVING, STEP, START) if self.at(place))

    def wait(self, reached, delay: float = 0) -> bool:
        """Wait until `reached()` and `delay` seconds more; False if the run ends before that."""
        while not reached():
            if self.process.poll() is not None or time.time() > self.began + PATIENCE:
                return False
            time.sleep(0.001)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(delay)
        return self.process.poll() is None

    def kill(self, one: bool, rng: random.Random) -> str:
        """Kill all processes of the run, or one of its ranks; says which."""
        processes = family(self.process.pid)
        ranks = [pid for pid in processes if is_rank(pid)] if self.ranks > 1 else processes
        if one and ranks:
            os.kill(rng.choice(ranks), signal.SIGKILL)
            return f"one of {len(ranks)}"
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return "all"

    def end(self) -> str:
        """Wait for the end; empty if the run ended with 0, else its status and last lines."""
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            status = f"none after {PATIENCE} s, killed"
            self.kill(False, random.Random())
        return "" if status == 0 else f"exit status {status}\n{self.output.read_text()[-2000:]}"


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(each for child in children for each in family(int(child)))]


def is_rank(pid: int) -> bool:
    """Whether torchrun started this process as a rank."""
    try:
        return b"\0RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def saved(run_dir: Path) -> int:
    """The step of the newest whole checkpoint, 0 without one."""
    newest = newest_iteration(run_dir / "checkpoints")
    return int(newest.name.removeprefix("iter_")) if newest else 0


@dataclass
class Straight:
    """A run that nobody killed, and how many seconds it spent in each place."""

    run_dir: Path
    model: str
    ranks: int
    seconds: dict[str, float]
    saves: list[float]  # seconds of each save: the first in a process takes longer

    def __str__(self) -> str:
        return f"{self.model}, {self.ranks} rank{'s' * (self.ranks > 1)}"


def straight(data: Path, run_dir: Path, model: str, ranks: int) -> Straight:
    """Run to the end and take the time; raises AssertionError if it fails."""
    attempt = Attempt(data, run_dir, model, ranks)
    times = {START: attempt.began}
    begun, whole = {}, {}

    def seen() -> bool:
        now = time.time()
        for place in (STEP, AFTER, EXPORT, DONE):
            if place not in times and attempt.at(place):
                times[place] = now
        begun.setdefault(attempt.saving(), now)
        whole.setdefault(saved(run_dir), now)
        return False

    attempt.wait(seen)
    assert not (failed := attempt.end()), failed
    following = dict(zip((START, STEP, AFTER, EXPORT), (STEP, AFTER, EXPORT, DONE), strict=True))
    seconds = {place: times[after] - times[place] for place, after in following.items()}
    return Straight(
        run_dir, model, ranks, seconds, [whole[step] - begun[step] for step in range(EVERY, STEPS + 1, EVERY)]
    )


def kill_at(place: str, data: Path, run_dir: Path, like: Straight, one: bool, rng: random.Random) -> tuple[str, str]:
    """Start a run and kill it at a place, or somewhat later. Returns where it hit ("" if too late) and a line.

    Raises AssertionError where the run fails before it is killed, or does not end once it is.
    """
    attempt, done = Attempt(data, run_dir, like.model, like.ranks), saved(run_dir)
    if done == STEPS and place in (STEP, SAVING):
        place = rng.choice((AFTER, EXPORT))
    step = rng.randrange(done + EVERY, STEPS + 1, EVERY) if place == SAVING else 0
    longest = (like.saves[0] if step == done + EVERY else like.saves[-1]) if step else like.seconds[place]
    delay = rng.uniform(0, longest)
    if not attempt.wait(lambda: attempt.saving() == step if step else attempt.at(place), delay):
        assert not (failed := attempt.end()), f"not killed yet, {failed}"
        return "", f"meant for {place}: too late, the run has ended with 0"
    victims = attempt.kill(one, rng)
    hit, step = attempt.place(), attempt.saving()
    failed = attempt.end()
    assert "none after" not in failed, failed
    where = f"{hit} of step {step}" if hit == SAVING and step else hit
    return hit, f"killed {victims:8}  {like}  in {where}, {time.time() - attempt.began:.1f} s, resumed from {done}"


def differences(run_dir: Path, like: Straight) -> list[str]:
    """What a run directory has else than the straight run's."""
    found = []
    for key in ("loss", "validation_loss", "test_loss"):
        ours, theirs = losses(run_dir, key), losses(like.run_dir, key)
        if ours != theirs or sum(key in line for line in read_metrics(run_dir / "metrics.jsonl")) != len(ours):
            found.append(f"{key}: {ours}, straight {theirs}")
    if files(run_dir) ^ files(like.run_dir):
        found.append(f"files that one has and the other has not: {sorted(files(run_dir) ^ files(like.run_dir))}")
    weights, theirs = (directory / "hf/model.safetensors" for directory in (run_dir, like.run_dir))
    if not weights.exists() or weights.read_bytes() != theirs.read_bytes():
        found.append("other exported weights")
    recorded, theirs = (
        [(output["aliases"], output["metadata"]["validation_loss"]) for output in outputs(directory)]
        for directory in (run_dir, like.run_dir)
    )
    if recorded != theirs:
        found.append(f"lineage of {recorded}, straight {theirs}")
    return found


def outputs(run_dir: Path) -> list[dict]:
    return json.loads((run_dir / "lineage.json").read_text())["outputs"]


def files(run_dir: Path) -> set[str]:
    """Names of all files and directories of a run, hidden ones too; those of TensorBoard have the date in them."""
    return {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.parent != run_dir / "tensorboard"} - {
        "tensorboard"
    }


def several(number: int, count: int, data: Path, out: Path, like: Straight, seed: int) -> list[tuple[str, str]]:
    """Kill one run `count` times, each time finishing a copy. Returns (place, kind of run and victims) of every kill.

    A failure is ("FAILED", what); its directories are kept.
    """
    rng = random.Random(f"{seed}/{number}")
    places = sorted(
        rng.choices(PLACES, k=count), key=lambda place: rng.random() * 4 if place == START else PLACES.index(place)
    )
    run_dir, hits = out / f"run-{number}", []
    try:
        for kill, place in enumerate(places, 1):
            hit, line = kill_at(place, data, run_dir, like, rng.random() < 0.5, rng)
            print(f"run-{number}.{kill}  {line}", flush=True)
            if hit:
                hits.append((hit, f"{like}, {'all' if ' all ' in line else 'one'}"))
            finish(data, run_dir, out / f"run-{number}.{kill}", like)
        shutil.rmtree(run_dir, ignore_errors=True)
    except AssertionError as error:
        print(f"run-{number}  FAILED: {error}", flush=True)
        hits.append(("FAILED", str(error)))
    return hits


def finish(data: Path, run_dir: Path, copy: Path, like: Straight) -> None:
    """Start a copy of a killed run again. Raises AssertionError unless it ends with 0 and as the straight run."""
    if run_dir.exists():  # else killed before it was made
        shutil.copytree(run_dir, copy, symlinks=True)
    attempt = Attempt(data, copy, like.model, like.ranks)
    assert not (failed := attempt.end()), f"{copy.name}: {failed}"
    assert not (found := differences(copy, like)), f"{copy.name}: " + "\n".join(found)
    print(f"{copy.name}  finished as the straight run, {time.time() - attempt.began:.1f} s", flush=True)
    shutil.rmtree(copy)


def table(hits: list[tuple[str, str]]) -> str:
    """Kills by place and by what was killed."""
    kinds = sorted({kind for place, kind in hits if place != "FAILED"})
    counts = Counter(hits)
    lines = [f"{'':22}" + "".join(f"{kind:>22}" for kind in kinds) + f"{'together':>22}"]
    for place in (*PLACES, DONE):
        numbers = [counts[place, kind] for kind in kinds]
        lines.append(f"{place:22}" + "".join(f"{number:22}" for number in (*numbers, sum(numbers))))
    failures = sum(place == "FAILED" for place, _ in hits)
    return "\n".join([*lines, f"{len(hits) - failures} kills, {failures} failures"])


def prepared(out: Path) -> Path:
    done = recipe("prep", "blend=tiny", "sample=600", f"output_dir={out}/data")
    assert done.returncode == 0, done.stderr
    return next((out / "data").rglob("metadata.json")).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="kills")
    parser.add_argument("--each", type=int, default=4, help="kills of one run directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first run directory")
    parser.add_argument("--jobs", type=int, default=2, help="run directories at once")
    parser.add_argument("--data", type=Path, help="a prepared directory; without it the tiny blend is prepared")
    asked = parser.parse_args()
    out = Path(tempfile.mkdtemp(prefix="kills-"))
    data = asked.data or prepared(out)
    numbers = range(asked.first, asked.first - (-asked.count // asked.each))
    likes = {}
    for model, ranks in {KINDS[number % len(KINDS)] for number in numbers}:
        like = likes[model, ranks] = straight(data, out / f"straight-{model}-{ranks}", model, ranks)
        spent = ", ".join(f"{place} {seconds:.2f} s" for place, seconds in like.seconds.items())
        print(f"straight: {like}: {spent}; saves {', '.join(f'{save:.3f}' for save in like.saves)} s", flush=True)

    def one(number: int) -> list[tuple[str, str]]:
        left = min(asked.each, asked.count - (number - asked.first) * asked.each)
        return several(number, left, data, out, likes[KINDS[number % len(KINDS)]], asked.seed)

    with ThreadPoolExecutor(asked.jobs) as pool:
        hits = [hit for run in pool.map(one, numbers) for hit in run]
    print(table(hits))
    if any(place == "FAILED" for place, _ in hits):
        sys.exit(f"see {out}")
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
