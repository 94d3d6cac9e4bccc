"""What runs where torch is: recipes' interface, the units, the merges, the tastes and local training."""
