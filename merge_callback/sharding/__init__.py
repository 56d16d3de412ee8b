"""How several processes keep one window together."""

from merge_callback.sharding.live import device_of, local, overwrite
from merge_callback.sharding.pieces import Piece
from merge_callback.sharding.ranks import Ranks, RemoteError, destroy_groups
from merge_callback.sharding.sharding import Sharding

__all__ = ["Piece", "Ranks", "RemoteError", "Sharding", "destroy_groups", "device_of", "local", "overwrite"]
