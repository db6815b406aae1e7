"""Output for people: answers query by query, charts, report page, TensorBoard pictures, tables."""
