"""Sandboxes that run JavaScript."""

from .base_sandbox import BaseSandbox


class NodeSandbox(BaseSandbox):
    """A sandbox that runs JavaScript with Node.js."""

    _image = "microsandbox/node"
    _language = "nodejs"
