"""The steps of every room wired into ingest, Stage 1 and Stage 2; Ray Data lives here."""
