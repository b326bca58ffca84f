"""The ground floor: errors, registries, configuration, name matching, plugins and logging. Never imports torch."""
