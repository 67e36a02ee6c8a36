"""The key-value stores of ``torch.distributed``. They are public there; their types are written under a private path alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
else:
    from torch.distributed import PrefixStore, Store, TCPStore

__all__ = ["PrefixStore", "Store", "TCPStore"]
