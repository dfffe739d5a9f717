"""Early exit after training: fitting a calibration and a gate, and the report of what they are worth."""
