"""Sandboxes that run Python."""

from .base_sandbox import BaseSandbox


class PythonSandbox(BaseSandbox):
    """A sandbox that runs Python."""

    _image = "microsandbox/python"
    _language = "python"
