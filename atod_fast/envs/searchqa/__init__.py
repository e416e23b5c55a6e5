"""Search-QA: questions whose answers have to be looked up."""
