"""How several processes keep one window together."""

from merge_callback.sharding.live import device_of, local, overwrite
from merge_callback.sharding.pieces import Piece
from merge_callback.sharding.ranks import Ranks, RemoteError
from merge_callback.sharding.sharding import Sharding

__all__ = ["Piece", "Ranks", "RemoteError", "Sharding", "device_of", "local", "overwrite"]
