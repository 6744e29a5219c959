"""A run's folder: what a run leaves on the disk, and how the next one finds it.

config.json has the hyperparameters, log.txt the numbers, step_NNNNNN.pt all that a continued run
needs; hf/, written last, the weights for other programs. `config` is train_gpt2.py's Config.
"""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the most updates."""
    return max(folder.glob("step_*.pt"), default=None)


def choose_run(config) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint in it to go on from, if any. SystemExit if that would
    mix this run with another."""
    runs = sorted(Path("log").glob(f"{config.preset}-[0-9][0-9][0-9]"))
    unfinished = [run for run in runs if not (run / "hf").exists()]  # written last
    if config.resume not in ("", "auto"):
        folder = Path(config.resume)
        if not newest_checkpoint(folder):
            raise SystemExit(f"{folder} holds no step_*.pt: give --resume a run's folder, or auto")
    elif config.out_dir:
        folder = Path(config.out_dir)
        used = [*folder.glob("config.json"), *folder.glob("log.txt"), *folder.glob("step_*.pt")]
        if used and not config.resume:
            raise SystemExit(f"{folder} holds a run: add --resume auto, or give another --out_dir")
    elif config.resume and unfinished:
        folder = unfinished[-1]
    else:
        folder = Path(f"log/{config.preset}-{int(runs[-1].name[-3:]) + 1 if runs else 1:03d}")
    return folder, newest_checkpoint(folder)


def start_folder(folder: Path, config, n_params: int):
    """Make the folder, with config.json. SystemExit if it could not take a checkpoint."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    except OSError as error:
        raise SystemExit(f"cannot write to {folder} ({error}): give another --out_dir") from None
    free, needed = shutil.disk_usage(folder).free, 12 * n_params  # bytes: 3 float32 a parameter
    if config.checkpoint_interval and free < needed:
        raise SystemExit(f"{folder}: {free:,} bytes free, a checkpoint takes {needed:,}: make room")


def save_checkpoint(folder: Path, step: int, config, model, optimizer, scaler):
    """Write step_NNNNNN.pt, after so many updates: tensors, numbers and strings alone. Data and
    dropout are functions of the step, so no generator needs saving."""
    path = folder / f"step_{step:06d}.pt"
    states = {"model": model, "optimizer": optimizer, "scaler": scaler}
    checkpoint = {name: part.state_dict() for name, part in states.items()}
    torch.save(checkpoint | {"step": step, "config": asdict(config)}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)  # whatever stops us, the file is whole or absent


def load_checkpoint(path: Path) -> dict:
    """What save_checkpoint wrote, on the CPU. SystemExit names a file that is not that."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn zip, another pickle, other keys: torch raises all kinds
        reason = str(error).split("\n")[0]
        raise SystemExit(f"{path} is damaged: remove it to use the one before ({reason})") from None


class RunLog:
    """log.txt, a line `step stream value` for each number; Weights & Biases too, if asked for."""

    def __init__(self, folder: Path, config, first_step: int):
        self.config, self.wandb_run = config, None
        self.path = folder / "log.txt"
        # a continued run does the steps since its checkpoint again: their lines go
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(line for line in lines if int(line.split()[0]) < first_step))
        os.replace(aside, self.path)

    def write(self, step: int, stream: str, value: float):
        with open(self.path, "a") as file:
            file.write(f"{step} {stream} {value:.6f}\n")
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


def read_log(folder: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """A run's log.txt as {stream: (steps, values)}."""
    streams = {}
    for line in (Path(folder) / "log.txt").read_text().splitlines():
        step, stream, value = line.split()
        steps, values = streams.setdefault(stream, ([], []))
        steps.append(int(step))
        values.append(float(value))
    return streams
