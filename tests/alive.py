"""What tensors cost: the bytes that are alive at the worst moment, and the largest tensor."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and remembers the most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = self.largest = 0
        self.storages = set()

    def release(self, size, place):
        self.now -= size
        self.storages.discard(place)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        for x in found if isinstance(found, (tuple, list)) else [found]:
            place = x.untyped_storage().data_ptr() if isinstance(x, torch.Tensor) else None
            if place is None or place in self.storages:
                continue
            size = x.untyped_storage().nbytes()
            self.storages.add(place)
            self.now, self.largest = self.now + size, max(self.largest, x.numel())
            self.most = max(self.most, self.now)
            weakref.finalize(x, self.release, size, place)
        return found
