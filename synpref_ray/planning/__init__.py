"""What a curation run costs and how long it takes, before it is run: prices, budgets, the scaling curve, and times from measured steps."""
