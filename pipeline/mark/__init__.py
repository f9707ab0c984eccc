"""What a film says about its making."""
