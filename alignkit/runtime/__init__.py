"""How a run is composed, checked, launched, sharded and stored."""
