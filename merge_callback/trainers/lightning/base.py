"""The class that Lightning knows our callbacks by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_callback.trainers.lightning.private import callback_bases

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    class LightningCallback(Callback):
        """As the type checker sees it."""

else:

    class LightningCallback(*callback_bases()):
        """The ``Callback`` classes of all Lightning packages that are in use."""
