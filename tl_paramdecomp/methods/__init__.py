"""Methods: how components are found. One file is one method."""
