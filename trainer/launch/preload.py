"""What a run imports on its way, all at once: a server of forks loads this, and each fork has it."""

import multiprocessing.synchronize
import random

import numpy.random
import rich.console
import torch.distributed.checkpoint
import torch.profiler

import trainer.checkpoint.loading
import trainer.checkpoint.saving
import trainer.job

__all__ = ["multiprocessing", "numpy", "random", "rich", "torch", "trainer"]
