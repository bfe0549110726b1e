"""What a move costs, beside what this machine can do at best. Not tests: ``make bench`` runs them."""
