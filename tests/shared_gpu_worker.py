"""The worker whose shards go by way of the host, as on GPUs that ranks share: -m tests.shared_gpu_worker train …"""

from trainer import cli
from trainer.parallel import sharding

if __name__ == "__main__":
    sharding.through_host = lambda device, group: True
    cli.main()
