"""Output for people: tables in the terminal, charts, exports, and the page of a warehouse."""
