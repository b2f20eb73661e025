"""The page: a browser on the client's own machine. Only this layer imports Gradio, which asks nobody anything here."""

import os

# Read by Gradio and the hub's client when they are imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
