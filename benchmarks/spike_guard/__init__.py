"""How old the weights should be that a run is restored to, and what is done with the optimizer."""
