"""ESPnet's task machinery meets this project here and nowhere else."""
