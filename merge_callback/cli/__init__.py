"""The commands of ``merge-callback``, one file each."""
