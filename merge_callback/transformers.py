"""``CheckpointMergeTrainerCallback``, for ``transformers.Trainer(callbacks=[…])``."""

from merge_callback.trainers.transformers.callback import CheckpointMergeTrainerCallback

__all__ = ["CheckpointMergeTrainerCallback"]
