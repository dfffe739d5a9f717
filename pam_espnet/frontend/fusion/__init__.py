"""How several encoders become one stream: single, average, concat, static, pam."""
