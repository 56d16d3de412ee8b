"""``torchmetrics.Metric``, or what replaces it if torchmetrics can't be imported."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchmetrics import Metric
else:
    try:
        from torchmetrics import Metric
    except ImportError:  # of torchmetrics itself, or of one of the many optional libraries that it imports

        class Metric:
            """Says why when a metric is made; nothing else needs it."""

            def __init__(self, **kwargs: Any) -> None:
                import torchmetrics  # noqa: F401  # raises


__all__ = ["Metric"]
