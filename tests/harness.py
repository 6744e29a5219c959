"""EleutherAI's lm-evaluation-harness with its own tasks, on a folder's model and JSON lines.

    python tests/harness.py MODEL hellaswag=one.jsonl lambada_openai=two.jsonl

prints {task: [its metrics, [[log-likelihood, is_greedy], ...] of each record]}, as JSON and last.
Without network: the tasks' data is exchanged for the files, their text and metrics are not.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ["DISABLE_MULTIPROC"] = "1"  # the bootstrap of perplexity's error needs no processes

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

SPLITS = {"hellaswag": "validation", "lambada_openai": "test"}


def run(lm, task: str, path: str) -> tuple[dict, list]:
    """A task's metrics, and what the model says of each record's continuations."""
    tasks = Path(lm_eval.__file__).parent / "tasks"
    with tempfile.TemporaryDirectory() as temp:
        config = {"include": str(tasks / task.removesuffix("_openai") / f"{task}.yaml")}
        config |= {"task": task, "dataset_path": "json", "dataset_name": None}
        config |= {"dataset_kwargs": {"data_files": {SPLITS[task]: path}, "cache_dir": temp}}
        Path(temp, "task.yaml").write_text(json.dumps(config | {"training_split": None}))
        # without defaults: indexing all of the harness's tasks takes seconds
        manager = TaskManager(include_path=temp, include_defaults=False)
        out = lm_eval.evaluate(lm=lm, task_dict=manager.load([task]), bootstrap_iters=100)
        # "acc,none" -> "acc": no filter is in use
        metrics = {key.removesuffix(",none"): value for key, value in out["results"][task].items()}
        samples = sorted(out["samples"][task], key=lambda sample: sample["doc_id"])
        return metrics, [sample["filtered_resps"] for sample in samples]


if __name__ == "__main__":
    lm = HFLM(sys.argv[1], device="cpu", batch_size=8)
    jobs = dict(argument.split("=", 1) for argument in sys.argv[2:])
    print("\n" + json.dumps({task: run(lm, task, path) for task, path in jobs.items()}))
