"""Settings: ``schema`` declares and checks them, ``presets`` has sizes and recipes, ``toml`` reads and writes files."""
