"""What a run needs to survive: its folder, its log, its checkpoints, and an ear for signals.

In the folder config.json has the hyperparameters, log.txt the numbers, step_NNNNNN.pt all that a
continued run needs; hf/, written last, the weights for other programs. `config` is train_gpt2.py's
Config.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout

# of a checkpoint
PARTS = {"model": dict, "optimizer": dict, "scaler": dict, "step": int, "config": dict, "data": str}


def step_of(path: Path) -> int:
    """The number of updates in a checkpoint's name, step_NNNNNN.pt."""
    return int(path.stem.removeprefix("step_"))


def checkpoint_paths(folder: Path) -> list[Path]:
    """A folder's checkpoints, from the fewest updates to the most."""
    found = folder.glob("step_*.pt") if os.path.isdir(folder) else ()
    return sorted((path for path in found if path.stem[5:].isdecimal()), key=step_of)


def load_checkpoint(path: Path) -> dict:
    """What a CheckpointWriter wrote, on the CPU. ValueError, one line, if the file is not that."""
    try:
        # each record of the archive carries its checksum, which torch.load does not look at
        with zipfile.ZipFile(path) as archive:
            torn = archive.testzip()
            # and it takes a record for an empty folder if its attributes, always 0, say so
            torn = torn or next((r.filename for r in archive.infolist() if r.external_attr), None)
        if torn:
            raise ValueError(f"the checksum of {torn} is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of them is an error too
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # plain data only
        parts = PARTS | ({"muon": dict} if "muon" in checkpoint else {})
        if {k: type(v) for k, v in checkpoint.items()} != parts or checkpoint["step"] < 0:
            raise ValueError("it is of another program")
        return checkpoint
    except FileNotFoundError:
        raise ValueError(f"{path} is not there") from None
    except Exception as error:  # a torn file, another pickle: zipfile and torch raise all kinds
        reason = (str(error) or repr(error)).splitlines()[0].split(". ")[0]  # torch adds advice
        raise ValueError(f"{path} is damaged ({reason})") from None


def newest_checkpoint(folder: Path) -> tuple[Path | None, dict | None]:
    """The path and content of a folder's newest checkpoint that is whole; None, None where there
    is no checkpoint. SystemExit where all are damaged."""
    damage = None
    for path in reversed(checkpoint_paths(folder)):
        try:
            return path, load_checkpoint(path)
        except ValueError as error:
            damage = error
            print(f"{damage}: trying the one before", flush=True)
    if damage:
        raise SystemExit(f"{damage}, and so is every other: remove them to begin anew")
    return None, None


ABOUT_THE_START = ("preset", "init_from", "resume", "resume_anyway", "out_dir")


def check_same_experiment(config, checkpoint: dict, data: str, network: tuple[str, ...]):
    """Print what differs from the hyperparameters, and the data, that the run had. SystemExit if
    it would not go on as the same experiment and resume_anyway is not set."""
    now = asdict(config) | {"data": data}
    # what a run of an earlier version does not name it had as it is by default
    then = now | asdict(type(config)()) | checkpoint["config"] | {"data": checkpoint["data"]}
    names = [field.name for field in fields(config)]
    harmless = {*names[names.index("data_dir") :]}  # as Config says there
    differ = [name for name in now if now[name] != then[name] and name not in ABOUT_THE_START]
    changes = [name for name in differ if name not in harmless]
    if differ:
        print("what differs from the run's hyperparameters:")
    for name in differ:
        effect = "changes the experiment" if name in changes else "changes no loss: taken"
        print(f"  {name:20} {then[name]!s:>16} -> {now[name]!s:16} {effect}")
    network = [name for name in network if name in changes]
    if network:
        flags = " ".join(f"--{name} {then[name]}" for name in network)
        raise SystemExit(
            f"a run keeps its network and its optimizer: give {flags}, or begin another run"
        )
    if changes and not config.resume_anyway:
        raise SystemExit(
            f"{', '.join(changes)} would change the experiment: give the run's, as above, or add "
            "--resume_anyway"
        )
    if checkpoint["step"] > config.max_steps:
        raise SystemExit(
            f"the run is past --max_steps {config.max_steps}, at step {checkpoint['step']} already"
        )


def claim(folder: Path) -> FileLock:
    """Make this process the folder's only writer while the lock is kept; the system frees a dead
    process's. SystemExit where another process is that."""
    lock = FileLock(folder / "owner.lock", is_singleton=True)  # a process may claim it again
    try:
        lock.acquire(timeout=0)
    except Timeout:
        owner = owner_of(folder)
        raise SystemExit(
            f"{folder} belongs to a run that is alive, process {owner.get('pid')} on "
            f"{owner.get('host')}: stop that one first, or give another --out_dir"
        ) from None
    except OSError as error:
        raise SystemExit(f"cannot write to {folder} ({error}): give another --out_dir") from None
    return lock


def launch() -> str | None:
    """The number of torchrun's launch, which its restarts keep."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def owner_of(folder: Path) -> dict:
    """What owner.json says of the process that wrote into the folder last."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        return dict(json.loads((folder / "owner.json").read_bytes()))
    return {}


def is_free(folder: Path) -> bool:
    try:
        claim(folder).release()
    except SystemExit:
        return False
    return True


def choose_run(config) -> tuple[Path | None, FileLock | None]:
    """The folder of the run to continue, claimed; None, None for a new run. SystemExit if that
    would mix two runs."""

    def is_ours(folder: Path) -> bool:
        """torchrun starts all ranks again when one has died: the run of this launch goes on."""
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        return restarts > 0 and owner_of(folder).get("launch") == launch()

    unfinished = [run for run in runs_of(config.preset) if not (run / "hf").exists()]
    folder = None
    if config.resume not in ("", "auto"):
        folder = Path(config.resume)
        if not checkpoint_paths(folder):
            raise SystemExit(f"{folder} holds no step_*.pt: give --resume a run's folder, or auto")
    elif config.out_dir:
        names, out = ("config.json", "log.txt", "step_*.pt"), Path(config.out_dir)
        if os.path.isdir(out) and any(path for name in names for path in out.glob(name)):
            folder = out
            if not config.resume and not is_ours(folder):
                raise SystemExit(f"{folder} holds a run: add --resume auto, or another --out_dir")
    elif any(map(is_ours, unfinished)):
        folder = next(filter(is_ours, reversed(unfinished)))
    elif config.resume:
        folder = next(filter(is_free, reversed(unfinished)), None)
    if folder is None:
        return None, None
    lock = claim(folder)
    log_entries(folder)  # a damaged line is said now, before anything is written
    return folder, lock


def runs_of(preset: str) -> list[Path]:
    """log/PRESET-NNN, the oldest first."""
    return sorted(Path("log").glob(f"{preset}-[0-9][0-9][0-9]"))


def start_folder(folder: Path | None, config, model) -> tuple[Path, FileLock]:
    """Make a run's folder, where it has none, claim it, and write config.json. SystemExit if it
    could not take a checkpoint."""
    try:
        if folder is None and config.out_dir:
            folder = Path(config.out_dir)
            folder.mkdir(parents=True, exist_ok=True)
        while folder is None:
            number = max((int(run.name[-3:]) for run in runs_of(config.preset)), default=0) + 1
            with contextlib.suppress(FileExistsError):  # another run, started at the same time
                free = Path(f"log/{config.preset}-{number:03d}")
                free.mkdir(parents=True)
                folder = free
        lock = claim(folder)
        for torn in folder.glob("step_*.tmp"):  # of a run that was killed
            torn.unlink()
        # those that are kept, and one more while it is written, at 3 float32 a parameter
        n = max(1, config.keep_checkpoints + 1 - len(checkpoint_paths(folder)))
        needed = n * 12 * sum(p.numel() for p in model.parameters())
        free = shutil.disk_usage(folder).free
        if config.checkpoint_interval and free < needed:
            raise SystemExit(
                f"{folder}: {free:,} bytes free, {n} checkpoints take {needed:,}: make room, or "
                "keep fewer by --keep_checkpoints"
            )
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "launch": launch()}
        for name, content in (("config", asdict(config)), ("owner", owner)):
            aside = folder / f"{name}.tmp"
            aside.write_text(json.dumps(content, indent=2) + "\n")
            os.replace(aside, folder / f"{name}.json")
    except OSError as error:
        place = folder or "log"
        raise SystemExit(f"cannot write to {place} ({error}): give another --out_dir") from None
    return folder, lock


class CheckpointWriter:
    """Writes checkpoints, step_NNNNNN.pt after so many updates, while the training goes on."""

    def __init__(self, folder: Path, config, data: str):
        self.folder, self.config, self.data = folder, config, data
        self.copies = {}  # a tensor's address -> its copy on the host, made once and used again
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.pending = None
        self.failure = ""  # why the last attempt failed

    def save(self, step: int, model, optimizer, scaler, muon=None):
        """Copy all states to host memory, and leave the rest to a thread. Data and dropout are
        functions of the step, so no generator needs saving."""
        self.wait()  # the copies are in use until their file is written
        if self.failure and not self.has_room():
            return  # tried again at every step: it should not stop the loop for nothing
        states = {"model": model, "optimizer": optimizer, "scaler": scaler}
        states |= {"muon": muon} if muon else {}
        checkpoint = {name: self.copy(part.state_dict()) for name, part in states.items()}
        checkpoint |= {"step": step, "config": asdict(self.config), "data": self.data}
        self.pending = self.thread.submit(self.write, step, checkpoint)

    def copy(self, part):
        """The same with every tensor copied; tied ones stay tied."""
        if isinstance(part, torch.Tensor):
            copy = self.copies.get(part.data_ptr())
            if copy is None:  # a GPU writes pinned memory several times as fast
                copy = torch.empty_like(part, device="cpu", pin_memory=part.is_cuda)
                self.copies[part.data_ptr()] = copy
            return copy.copy_(part)
        if isinstance(part, dict):
            return {key: self.copy(value) for key, value in part.items()}
        return [self.copy(value) for value in part] if isinstance(part, list) else part

    def has_room(self) -> bool:
        needed = sum(copy.nbytes for copy in self.copies.values())
        with contextlib.suppress(OSError):
            return shutil.disk_usage(self.folder).free > needed
        return False  # the disk is gone

    def write(self, step: int, checkpoint: dict):
        """Where that fails the run goes on: `failure` says why until a later attempt succeeds."""
        path = self.folder / f"step_{step:06d}.pt"
        aside = path.with_suffix(".tmp")
        try:
            if not self.has_room():  # do not take the last bytes from the log
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            torch.save(checkpoint, aside)  # by its name: a Python file would stop the loop's Python
            with open(aside, "rb+") as file:
                os.fsync(file.fileno())  # on the disk itself, before it gets its name
            os.replace(aside, path)  # whatever stops us, it is whole or absent
            self.remove_old(step)  # and only now is any other file dispensable
            self.failure = ""
        except (OSError, RuntimeError) as error:
            self.failure = getattr(error, "strerror", None) or str(error).splitlines()[0]
            try:
                if isinstance(error, RuntimeError):  # torch does not tell the system's reason
                    with open(aside, "ab") as file:
                        file.write(bytes(2**20))
            except OSError as reason:
                self.failure = reason.strerror
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)

    def remove_old(self, step: int):
        """Of the checkpoints up to this one leave the last few, and the archive."""
        keep, interval = self.config.keep_checkpoints, self.config.archive_interval
        paths = [path for path in checkpoint_paths(self.folder) if step_of(path) <= step]
        for path in paths[:-keep] if keep else []:
            if not interval or step_of(path) % interval:
                path.unlink()

    def wait(self):
        """Until the last file is written."""
        if self.pending:
            self.pending.result()


class RunLog:
    """log.txt, a line `step stream value` for each number; Weights & Biases too, if asked for."""

    def __init__(self, folder: Path, config, first_step: int):
        self.config, self.wandb_run = config, None
        self.path = folder / "log.txt"
        # a continued run does the steps since its checkpoint again: their lines go
        entries = [entry for entry in log_entries(folder) if entry[0] < first_step]
        self.losses = [value for _, stream, value in entries if stream == "train"]
        aside = self.path.with_suffix(".tmp")
        aside.write_bytes("".join(line_of(*entry) for entry in entries).encode())
        os.replace(aside, self.path)
        self.size, self.unwritten = self.path.stat().st_size, ""

    def write(self, step: int, stream: str, value: float):
        self.unwritten += line_of(step, stream, value)
        with contextlib.suppress(OSError):  # on a full disk the lines wait
            with open(self.path, "r+b") as file:
                file.truncate(self.size)  # a line may have been cut off
                file.seek(self.size)
                file.write(self.unwritten.encode())
            self.size, self.unwritten = self.size + len(self.unwritten), ""
        self.mirror(step, {stream: value})

    def mirror(self, step: int, values: dict):
        """Send numbers or tables of texts to Weights & Biases; the run outlives its failures."""
        if not self.config.wandb:
            return
        try:
            import wandb

            self.wandb_run = self.wandb_run or wandb.init(
                project="gpt2", name=self.path.parent.name, config=asdict(self.config)
            )
            if "samples" in values:
                rows = [[text] for text in values["samples"]]
                values = {"samples": wandb.Table(columns=["text"], data=rows)}
            self.wandb_run.log(values, step=step)
        except Exception as error:
            self.config = replace(self.config, wandb=False)
            print(f"wandb failed, the run goes on without it: {error}", flush=True)


class StopSignal:
    """Notes a signal, so that the run can stop where nothing is lost; a second stops it at once."""

    def __init__(self, signals: Iterable[signal.Signals]):
        self.signum, self.noted_at = 0, math.inf
        for signum in signals:
            signal.signal(signum, self.note)

    def note(self, signum: int, frame):
        # within a second it is the same one: torchrun passes on what the terminal gave to all
        if time.monotonic() > self.noted_at + 1:
            os._exit(128 + signum)
        if not self.signum and int(os.environ.get("RANK", 0)) == 0:
            os.write(2, b"\nstopping after this step, with a checkpoint; once more: at once\n")
        self.signum, self.noted_at = signum, min(self.noted_at, time.monotonic())


class Watchdog:
    """Ends a rank that has stood still for so many seconds. Most likely it waits for another one
    that hangs or is gone, and would wait for as long as somebody pays."""

    def __init__(self, rank: int, seconds: float):
        self.rank, self.seconds = rank, seconds
        self.seen("the start")
        if seconds:
            threading.Thread(target=self.watch, daemon=True).start()

    def seen(self, what: str):
        """A sign of life: `what` begins."""
        self.what, self.since = what, time.monotonic()

    def watch(self):
        while (left := self.since + self.seconds - time.monotonic()) > 0:
            time.sleep(left)
        main_thread = sys._current_frames()[threading.main_thread().ident]
        ours = Path(__file__).parent  # not torch's
        stack = traceback.extract_stack(main_thread)
        *_, here = (frame for frame in stack if Path(frame.filename).parent == ours)
        text = f"rank {self.rank}: {self.what} has stood still for {self.seconds:g} s, at line "
        text += f"{here.lineno}, {here.line}: another rank hangs\n"
        os.write(2, text.encode())
        os._exit(1)


def line_of(step: int, stream: str, value: float) -> str:
    return f"{step} {stream} {value:.6f}\n"


def log_entries(folder: str | Path) -> list[tuple[int, str, float]]:
    """(step, stream, value) for each line of a run's log.txt. SystemExit names a damaged line."""
    path = Path(folder) / "log.txt"
    try:
        lines = path.read_bytes().decode(errors="replace").split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SystemExit(f"{path} cannot be read ({error.strerror}): mend or remove it") from None
    entries = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last \n was cut off
        try:
            step, stream, value = line.split(" ")
            entries.append((int(step), stream, float(value)))
        except ValueError:
            raise SystemExit(
                f"{path}, line {number}: {line[:40]!r} is not `step stream value`: remove it"
            ) from None
    return entries


def read_log(folder: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """A run's log.txt as {stream: (steps, values)}."""
    streams = {}
    for step, stream, value in log_entries(folder):
        steps, values = streams.setdefault(stream, ([], []))
        steps.append(step)
        values.append(value)
    return streams
