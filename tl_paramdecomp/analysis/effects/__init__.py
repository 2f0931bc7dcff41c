"""What components do for a metric, or for each other: by ablating, patching, or gradients.

An effect is everywhere the number with the component minus the number without it; positive values speak for the component.
"""
