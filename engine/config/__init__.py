"""Settings: fields, flags, TOML, recipes."""
