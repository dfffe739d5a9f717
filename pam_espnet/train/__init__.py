"""Training with ESPnet's task machinery, which no other folder imports."""
