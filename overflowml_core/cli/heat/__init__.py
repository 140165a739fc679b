"""Pictures of expert heat: layers down, experts across. In the terminal, as SVG, and as a page for a browser."""
