"""The two apps of the federation that federation.yaml describes."""

from pathlib import Path

from jaxdist.flower import client_app, server_app

CONFIG = Path(__file__).parent / "federation.yaml"
client = client_app(CONFIG)
server = server_app(CONFIG)
