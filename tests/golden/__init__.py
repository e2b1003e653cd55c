"""Numbers of the published system, and the command that holds this code against them."""
