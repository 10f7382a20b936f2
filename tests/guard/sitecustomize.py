"""Python imports this when it starts with this folder on its path, as tests start it."""

from tests.network import install

install()
