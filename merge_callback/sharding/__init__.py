"""What several processes need to keep one window together."""

from merge_callback.sharding.ranks import Ranks, RemoteError

__all__ = ["Ranks", "RemoteError"]
