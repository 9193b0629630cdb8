"""scripts/gpu as the tests run it: `python -m tests.small_gpu_script CORPUS ARGUMENTS`.

A process that is forked has all imports, so its parts fork their fork server too, and the text is a small one: most of
the time of the whole would go into imports, and into looking through the standard library's files.
"""

import functools
import sys

from scripts import gpu, gpu_parts
from trainer.launch import agent, forkserver

if __name__ == "__main__":
    gpu_parts.QUIET.append(f'data.source="{sys.argv.pop(1)}"')
    modules = [*forkserver.PRELOADED, "torch.distributed.run"]
    setattr(agent, "warm_server", functools.cache(lambda: forkserver.fork(modules)))  # noqa: B010
    sys.exit(gpu.main())
