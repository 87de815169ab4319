"""The small sweep and the laboratory of the neighbouring tests."""

from tests.runs.e2e.conftest import lab as lab
from tests.runs.sweep.conftest import bench as bench
