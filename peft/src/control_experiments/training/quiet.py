"""Leaving the terminal to our own lines, the progress bar and errors."""

from __future__ import annotations

import warnings

import datasets
import huggingface_hub
import transformers


def quieten() -> None:
    """Silence what the libraries tell of their own accord: warnings for developers, retries of the hub, loading bars."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    # saving an adapter, peft looks for the base's configuration, which a GGUF file or random weights do not have
    warnings.filterwarnings("ignore", message="Could not find a config file in")
    # of DataLoader, with more workers than cores
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
