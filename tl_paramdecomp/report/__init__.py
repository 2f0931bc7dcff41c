"""Figures; matplotlib loads when one is drawn, and is the optional extra `plots`."""
