"""One module a command; the only place where engine, data and eval meet."""
