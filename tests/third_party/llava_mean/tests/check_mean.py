"""The package's own tests: `pytest tests/check_mean.py` where it is installed."""

from llava_mean import Mean  # type: ignore[import-not-found]

from llavakit import Connector, Options
from llavakit.testing import ConnectorContract


class TestMean(ConnectorContract):
    def build(self) -> Connector:
        widths = {"vision_width": self.vision_width, "language_width": self.language_width}
        connector: Connector = Mean(Options(), **widths)
        return connector
