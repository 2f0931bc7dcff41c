"""What L3D's subnetworks do."""
