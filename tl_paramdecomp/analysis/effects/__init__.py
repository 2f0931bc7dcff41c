"""What components do to a metric, or to each other: by ablating, patching, or gradients."""
