"""Other libraries' models under sequence parallelism; each room is imported where it is used."""
