"""The page in a browser: what it shows of an answer, and its layout."""
