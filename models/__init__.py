"""The networks of Latent MIM and the functions on them. Pure torch + timm: no config, no data."""
