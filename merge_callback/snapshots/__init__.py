"""Snapshots and the window that holds them: layout, arena, capture and restore, storage."""
