"""Python imports this when it starts with this folder on its path, as tests start it."""

from importlib import util
from pathlib import Path

spec = util.spec_from_file_location("deepspec_tests_network", Path(__file__).parents[1] / "network.py")
network = util.module_from_spec(spec)  # by its file: the repository need not be on the path
spec.loader.exec_module(network)
network.install()
