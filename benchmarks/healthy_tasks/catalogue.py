"""All tasks: importing this registers them."""

from healthy_tasks import (
    adversarial,
    objectives,
    order,
    precision,
    reinforcement,
    schedules,
    surgery,
)
from healthy_tasks.task import TASKS

__all__ = [
    "TASKS",
    "adversarial",
    "objectives",
    "order",
    "precision",
    "reinforcement",
    "schedules",
    "surgery",
]
