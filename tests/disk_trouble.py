"""Runs under `unshare --user --mount`, as root of its own mounts: a disk that fills up and a folder that turns
read-only under a real run, which has to go on and to lose nothing.

    unshare -rm python tests/disk_trouble.py FOLDER RECIPE

FOLDER is where a small tmpfs is mounted; RECIPE's run lies there. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from patience import PATIENCE, until
from recovery import spawn, train, wait_for


def mount(*args: object) -> None:
    subprocess.run(["mount", *map(str, args)], check=True)


def events(run: Path) -> list[str]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [r["detail"] for r in map(json.loads, lines) if r.get("what") == "save_failed"]


def main(folder: Path, recipe: Path) -> None:
    run, checkpoints = folder / recipe.stem, folder / recipe.stem / "checkpoints"
    told: dict[str, object] = {}
    said = Path(f"{folder}-stderr")  # on another disk

    def failures() -> int:
        return said.read_text().count("not saved, training continues")

    mount("-t", "tmpfs", "-o", "size=4m", "none", folder)
    with open(said, "w") as stderr:
        process = spawn([recipe], stderr=stderr)
    wait_for(run, process, 60)
    before = sorted(p.name for p in checkpoints.iterdir())

    ballast = folder / "ballast"  # the disk fills to the last byte, for everything
    with open(ballast, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1 << 8, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    # A save may be under way already. It fails at its first byte; those after it are refused before they begin.
    until(lambda: "more than its disk has free" in said.read_text(), process)
    told["alive on the full disk"] = process.poll() is None
    told["older one kept"] = sorted(p.name for p in checkpoints.glob("step-*"))[-1] >= before[0]
    size = (run / "metrics.jsonl").stat().st_size
    ballast.unlink()
    wait_for(run, process, 10)
    told["full"] = events(run)
    told["caught up"] = (run / "metrics.jsonl").stat().st_size > size

    mount("-t", "tmpfs", "-o", "ro", "none", checkpoints)  # hides the folder under a read-only one
    until(lambda: sum("could not be written (Read-only file system)" in e for e in events(run)) >= 2, process)
    subprocess.run(["umount", str(checkpoints)], check=True)
    wait_for(run, process, 15)
    process.terminate()
    told["code"], told["warnings"] = process.wait(PATIENCE), failures()

    # And a disk that is full at the end: the last save is not optional.
    with open(ballast, "wb", buffering=0) as file:
        file.write(bytes(os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize - (300 << 10)))
    steps = told["steps"] = int(max(p.name for p in checkpoints.iterdir())[5:]) + 7
    code, err = train([run, "--steps", steps])
    told["last save"] = [code, json.loads((run / "exit.json").read_text())["reason"], err.splitlines()[-1]]
    told["checkpoints"] = sorted(p.name for p in checkpoints.iterdir())
    ballast.unlink()
    told["then"] = train([run])[0]
    shutil.copytree(run, Path(f"{folder}-result"))
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
