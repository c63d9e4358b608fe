"""The paper's decisions as pure functions of stored columns: how many neighbours, whose vote, keep or flip, when to stop. No model runs "
"here."""
