"""Tasks learnt one after another: what is done against forgetting, and how much is forgotten."""
