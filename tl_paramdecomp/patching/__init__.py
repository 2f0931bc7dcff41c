"""Patching: components put back into the running model through the hooks its users already use."""
