"""Front doors: each module parses arguments and calls one function of a lower floor."""
