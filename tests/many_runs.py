"""Runs of one rank, one after the other in one process: -m tests.many_runs CONFIG JSON DIRECTORY

JSON is a list of the overrides of each run; run N goes to DIRECTORY/N.
"""

import json
import sys
import time
from pathlib import Path

from trainer import config, job

if __name__ == "__main__":
    for number, overrides in enumerate(json.loads(sys.argv[2])):
        job.train(config.load(Path(sys.argv[1]), overrides), Path(sys.argv[3]) / str(number), time.time())
