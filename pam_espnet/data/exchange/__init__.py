"""Data of other toolkits: readers that make data directories of them (``sources``, ``writer``), and the way back
(``export``)."""
