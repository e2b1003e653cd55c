"""Numbers of other methods' original code, and the command that holds the switches against them."""
