"""Imports everything that a run imports on its way. The fork server loads this, so that each fork has it."""

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
