"""`landmark` under FSDP on processes of the CPU. accelerate shards over accelerators only, so it is told of some."""

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from landmark_cli.__main__ import main

begin = PartialState.__init__


def begin_as_on_gpus(self, *arguments, **options):
    first = not PartialState._shared_state
    begin(self, *arguments, **options)
    if first:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = begin_as_on_gpus
    main()
