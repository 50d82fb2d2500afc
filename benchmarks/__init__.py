"""Studies: the offline demo and the table on real photos, each one command."""
