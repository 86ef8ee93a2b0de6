"""What a server counts of itself, in Prometheus' text format."""

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Of one server; two in one process have nothing in common."""

    def __init__(self, sizes: list[int], waiting: Callable[[], int]):
        """sizes: of batches. waiting: how many pictures wait for one now."""
        self._registry = kept = CollectorRegistry()
        self.requests = Counter("tif_requests", "Pictures sent, by the status answered", ["status"], registry=kept)
        self.seconds = Histogram("tif_request_seconds", "From a request to its answer", buckets=_SECONDS, registry=kept)
        self.batches = Histogram("tif_batch_images", "Pictures in a batch", buckets=sizes, registry=kept)
        self.gmac = Counter("tif_gmac", "1e9 multiply-adds for pictures answered", registry=kept)
        self.in_progress = Gauge("tif_requests_in_progress", "Accepted and not yet answered", registry=kept)
        Gauge("tif_waiting_images", "Waiting for a batch", registry=kept).set_function(waiting)

    def text(self) -> bytes:
        return generate_latest(self._registry)
