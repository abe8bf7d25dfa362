"""Download GLUE tasks from the hub into folders that need no network afterwards.

    python -m RoBERTa.download_glue                                   all nine tasks into RoBERTa/data/glue
    python -m RoBERTa.download_glue --tasks cola rte --output FOLDER
    DATA=FOLDER bash RoBERTa/run_roberta.sh control cola

Each task becomes a `datasets.save_to_disk` folder; a task that is there already is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from control_experiments.errors import UserError, run_main
from control_experiments.training.arguments import parse_arguments
from RoBERTa.glue import GLUE_TASKS, HUB_ID


@dataclass
class Options:
    tasks: list[str] = HfArg(default_factory=lambda: list(GLUE_TASKS), help="Which tasks.", metadata={"choices": [*GLUE_TASKS]})
    output: str = HfArg(default=str(Path(__file__).resolve().parent / "data" / "glue"), help="Folder for all tasks.")


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    from datasets import load_dataset

    from control_experiments.training.checkpoints import whole_folder
    from control_experiments.training.quiet import quieten

    quieten()
    for task in options.tasks:
        folder = Path(options.output) / task
        if (folder / "dataset_dict.json").is_file():
            print(f"{folder} is there already")
            continue
        try:
            splits = load_dataset(HUB_ID, task)
            with whole_folder(folder, sealed=False) as place:
                splits.save_to_disk(str(place))
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"cannot download {task} from {HUB_ID}: {reason} (is there a network?)") from error
        print(f"{folder} saved")


if __name__ == "__main__":
    run_main(main)
